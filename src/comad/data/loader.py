"""Batches of views in an order that depends on the seed alone: not on workers, processes or interruptions."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from comad.data.images import DECODED_FOR, ImageSet, UnreadableImageError
from comad.data.transforms import evaluation_view
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.progress import Working, show

AHEAD = 4
"""Batches that each process reads ahead."""
READ_AHEAD = 4 << 20
"""Bytes that the disk is asked for at a time, where shards are read one after another."""
SHARED = Path("/dev/shm")
"""Where Linux keeps memory that processes share."""
MAX_UNREADABLE_RUN = 100
"""So many unreadable files in a row mean that something else is wrong."""
DECODED_TOGETHER = 4
"""More images at a time would push each other out of the cache."""


class Sample(NamedTuple):
    """Views of one image, and the random numbers that belong to them."""

    views: tuple[Tensor, ...]
    noise: Tensor


class Batch(NamedTuple):
    """Collated samples.

    Attributes:
        views: uint8 (B, 3, H, W) each.
        noise: float32 (B, ...), uniform in [0, 1): masks are drawn from it, so that they belong to the sample.
        image: int64 (B,), which image was asked for.
        view: int64 (B,), the number of the sample's view: the epoch, or the epoch modulo the fixed views.
        readable: bool (B,), False where the file was unreadable and the next readable one stands in.
    """

    views: tuple[Tensor, ...]
    noise: Tensor
    image: Tensor
    view: Tensor
    readable: Tensor


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How training images are read.

    Args:
        workers: processes that decode and augment; 0 does it in the training process, -1 takes the cores that the
            training processes of this machine leave free: each at least one, at most eight.
        deadline: seconds that a batch may take a worker, before the run ends with a word; 0: it waits for ever.
        fixed_views: views per image that repeat epoch after epoch, the same for all seeds; 0 draws new ones each time.
        shuffle_buffer: for shards on slow disks: they are read one after another in random order, and so many images
            mix; 0: each epoch is a permutation of all images, read in any order.
    """

    workers: int = field(default=-1, metadata=NO_EFFECT)
    deadline: float = field(default=900.0, metadata=NO_EFFECT)
    fixed_views: int = field(default=0, metadata=COMMON)
    shuffle_buffer: int = 0

    def __post_init__(self) -> None:
        if self.deadline < 0:
            raise ValueError(f"--loader.deadline {self.deadline:g} is too small; use 0 or more.")
        for name in ("fixed_views", "shuffle_buffer"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--loader.{flag} {getattr(self, name)} is too small; use 0 or more.")

    @property
    def num_workers(self) -> int:
        """Worker processes of this training process."""
        together = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return self.workers_of(int(os.environ.get("LOCAL_WORLD_SIZE", together)))  # set where a run starts

    def workers_of(self, here: int) -> int:
        """Worker processes of each of so many training processes on this machine."""
        if self.workers >= 0:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(max(cores // here - 1, 1), 8)


@contextmanager
def randomness_of(seed: int, view: int, index: int) -> Iterator[None]:
    """Random numbers that are a function of a sample alone; those outside go on undisturbed."""
    with torch.random.fork_rng(devices=[]):
        # the generator itself: torch.manual_seed also asks every kind of accelerator, which takes longer than a view
        torch.default_generator.manual_seed(((seed * 1_000_003 + view) * 1_000_000_007 + index) % 2**64)
        yield


class ViewDataset(Dataset[Batch]):
    """Images as random views. A sample's randomness is a function of (seed, view number, image).

    Args:
        images: what is viewed.
        make: image → its views, uint8 (3, H, W) each, and the random numbers that belong to them; draws with torch.
        seed: of all views.
        min_side: see `ImageSet.load`.
    """

    def __init__(
        self, images: ImageSet, make: Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]], seed: int, min_side: int
    ):
        self.images = images
        self.make = make
        self.seed = seed
        self.min_side = min_side

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self._sample(key, *self._load(key[1]))

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Batch]:
        """What the loader asks for. A few images are decoded, then viewed: each finds its code in the CPU's cache."""
        samples = []
        for first in range(0, len(keys), DECODED_TOGETHER):
            group = keys[first : first + DECODED_TOGETHER]
            loaded = [self._load(index) for _, index in group]
            samples += [self._sample(key, *image) for key, image in zip(group, loaded, strict=True)]
        return samples

    def _sample(self, key: tuple[int, int], image: Tensor, readable: bool) -> Batch:
        view, index = key
        with randomness_of(self.seed, view, index):
            views, noise = self.make(image)
        return Batch(views, noise, torch.tensor(index), torch.tensor(view), torch.tensor(readable))

    def _load(self, index: int) -> tuple[Tensor, bool]:
        tried, told = min(MAX_UNREADABLE_RUN, len(self.images)), ""
        for step in range(tried):
            try:
                return self.images.load((index + step) % len(self.images), self.min_side), step == 0
            except UnreadableImageError as error:
                told = str(error)
        raise ValueError(
            f"{tried} files in a row are unreadable, from {self.images.path(index)} on ({told}); check them."
        )


def shard_order(shards: np.ndarray, buffer: int, generator: torch.Generator) -> list[int]:
    """An order of all images that reads shards one after another, in random order, and mixes ``buffer`` images.

    A function of the generator's seed alone, so a run resumes in the middle of it as in any other order. The image at a
    place of the order lies at most ``buffer`` images further on in the reading than that place.

    Args:
        shards: shard of each image.
        buffer: images that wait; each place is given to one of them, drawn evenly.
        generator: to draw with.
    """
    numbers, where = np.unique(shards, return_inverse=True)
    rank = torch.randperm(len(numbers), generator=generator).numpy()
    stream = np.argsort(rank[where.reshape(-1)], kind="stable").tolist()
    waiting, coming = stream[:buffer], stream[buffer:]
    order = []
    drawn = torch.randint(max(1, len(waiting)), (len(coming),), generator=generator).tolist()
    for image, place in zip(coming, drawn, strict=True):
        order.append(waiting[place])
        waiting[place] = image
    return order + [waiting[place] for place in torch.randperm(len(waiting), generator=generator).tolist()]


def check_order(config: LoaderConfig, images: Any) -> None:
    """Say that the order of a run cannot be followed, before the run begins.

    Raises:
        ValueError: images that lie in files of their own are to be read by shards.
    """
    numbers = getattr(images, "shard_numbers", None)
    if config.shuffle_buffer and (numbers is None or numbers() is None):
        raise ValueError(
            "--loader.shuffle-buffer reads shards in their order, and these images are files of their own; leave it "
            "out, or write shards: comad data shard FOLDER --out FOLDER."
        )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (view number, image); every epoch is an order drawn from the seed, see `shard_order`.

    Args:
        num_images, batch_size: over all processes.
        seed: of the order.
        span: first batch, and the one to stop before, counted from the start of the run.
        fixed_views: view numbers repeat after so many epochs; 0: never.
        share: number of this process and of all processes; each takes its part of every batch.
        draw: generator → an order of all images; None: a permutation.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        span: tuple[int, int],
        *,
        fixed_views: int = 0,
        share: tuple[int, int] = (0, 1),
        draw: Callable[[torch.Generator], list[int]] | None = None,
    ):
        self.draw = draw or self._permutation
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start, self.stop = span
        self.fixed_views = fixed_views
        self.process, self.num_processes = share

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.num_images // self.batch_size
        epoch, order = -1, []
        for number in range(self.start, self.stop):
            if number // per_epoch != epoch:
                epoch = number // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = self.draw(generator)
            first = (number % per_epoch) * self.batch_size
            chosen = order[first : first + self.batch_size]
            view = epoch % self.fixed_views if self.fixed_views else epoch
            yield [(view, index) for index in chosen[self.process :: self.num_processes]]

    def _permutation(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(self.num_images, generator=generator).tolist()


def training_batches(
    dataset: Any, batches: Iterable[Any], config: LoaderConfig, collate: Callable[[list], Any] | None = None
) -> DataLoader:
    """Load the named batches in order, ahead of the training process. ``collate`` makes a batch of samples.

    Raises:
        ValueError: there is too little shared memory to read ahead.
    """
    first = next(iter(batches), None) if config.num_workers else None
    needed = config.num_workers * AHEAD * len(first) * _num_bytes(dataset[first[0]]) if first else 0
    if not has_shared_memory(needed):
        raise ValueError(
            f"{config.num_workers} processes that read images ahead need {needed / 1e6:,.0f} MB of shared memory, and "
            f"{SHARED} has less; give a container more (docker run --shm-size 8g), or pass --loader.workers 0."
        )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.num_workers,
        prefetch_factor=AHEAD if config.num_workers else None,
        timeout=config.deadline if config.num_workers else 0,
        generator=torch.Generator(),  # else the loader draws its seed from the training's generator
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
    )


def has_shared_memory(needed: int) -> bool:
    """Whether processes have so many bytes to hand batches over in; a full one would kill them without a word."""
    return not needed or not SHARED.is_dir() or needed <= shutil.disk_usage(SHARED).free


def _num_bytes(sample: Any) -> int:
    """Of all tensors in a sample."""
    if isinstance(sample, Tensor):
        return sample.nbytes
    parts = sample.values() if isinstance(sample, dict) else sample if isinstance(sample, tuple | list) else ()
    return sum(map(_num_bytes, parts))


def _begin_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the workers too; the training process still needs batches to end its step.

    A worker leaves when it is told that the loading is over, or finds that its parent is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _tell_unless_alone


def _tell_unless_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What multiprocessing's threads in a worker print: nothing of a training process that was killed as it read."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


class _EvaluationDataset(Dataset[tuple[tuple[Tensor, ...], bool]]):
    def __init__(self, images: ImageSet, image_sizes: Sequence[int], indices: Tensor):
        self.images = images
        self.image_sizes = image_sizes
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[tuple[Tensor, ...], bool]:
        crop, index = self.images.eval_crop, int(self.indices[position])
        sides = [round(max(DECODED_FOR, size) / crop) for size in self.image_sizes]
        try:
            decoded = {side: self.images.load(index, side) for side in dict.fromkeys(sides)}
        except UnreadableImageError:
            return tuple(torch.full((3, size, size), 255, dtype=torch.uint8) for size in self.image_sizes), False
        pairs = zip(self.image_sizes, sides, strict=True)
        return tuple(evaluation_view(decoded[side], size, crop) for size, side in pairs), True


def evaluation_batches(
    images: ImageSet, image_size: int, batch_size: int = 256, indices: Tensor | None = None
) -> Iterator[Tensor]:
    """Fixed views in order: float32 (b, 3, image_size, image_size) in [0, 1]; see `evaluation_views`."""
    return (batch for (batch,) in evaluation_views(images, (image_size,), batch_size, indices))


def evaluation_views(
    images: ImageSet, image_sizes: Sequence[int], batch_size: int = 256, indices: Tensor | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Fixed views of several sizes in order: float32 (b, 3, size, size) in [0, 1].

    An image is decoded once for all views of up to `DECODED_FOR` pixels, and once for each larger size; so a view is
    the same alone and beside others. An unreadable file is a white image, and it is said how many there are.
    """
    dataset = _EvaluationDataset(images, image_sizes, torch.arange(len(images)) if indices is None else indices)
    wanted = max(2, LoaderConfig().num_workers) if len(dataset) > 2048 else 0
    ahead = wanted * 2 * batch_size * 3 * sum(size**2 for size in image_sizes)  # two batches each
    workers = wanted if has_shared_memory(ahead) else 0
    unreadable = 0
    batches = DataLoader(dataset, batch_size=batch_size, num_workers=workers, generator=torch.Generator())
    with Working(f"features of {images.name}", len(dataset), "images") as told:
        for views, readable in batches:
            unreadable += int((~readable).sum())
            yield tuple(view.float().div_(255) for view in views)
            told.advance(len(readable))
    if unreadable:
        _tell_unreadable(images.name, unreadable)


@lru_cache
def _tell_unreadable(name: str, count: int) -> None:
    """Once, however often the images are looked at."""
    show(f"comad: {count} unreadable images of {name} are scored as white images; restore or remove them.")


@dataclass(frozen=True)
class TrainingBatches:
    """All batches of a run in their order, for `comad.runtime.trainer.Trainer`.

    Args:
        dataset: gives a batch of one for (view number, image).
        num_images: of the training set.
        image_name: number of an image → its file.
        batch_size: over all processes.
        seed: of the order.
        config: how they are read.
        collate: makes a batch of samples; None: torch's way.
    """

    dataset: Dataset
    num_images: int
    image_name: Callable[[int], str]
    batch_size: int
    seed: int
    config: LoaderConfig
    collate: Callable[[list], Any] | None = None

    def load(self, first: int, last: int, rank: int = 0, world_size: int = 1) -> DataLoader:
        """The share of one process in the batches from ``first`` up to ``last``, read ahead of the training process."""
        order = EpochBatches(
            self.num_images,
            self.batch_size,
            self.seed,
            (first, last),
            fixed_views=self.config.fixed_views,
            share=(rank, world_size),
            draw=self._by_shards(),
        )
        return training_batches(self.dataset, order, self.config, self.collate)

    def _by_shards(self) -> Callable[[torch.Generator], list[int]] | None:
        """The order of ``shuffle_buffer``; the images are told to read ahead."""
        images = getattr(self.dataset, "images", None)
        check_order(self.config, images)
        if not (self.config.shuffle_buffer and isinstance(images, ImageSet)):
            return None
        images.ahead, shards = READ_AHEAD, images.shard_numbers()
        return None if shards is None else partial(shard_order, shards, self.config.shuffle_buffer)
