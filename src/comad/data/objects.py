"""Images that Python has already: datasets of torch, torchvision or Hugging Face, or any sequence of images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.decoding import UnreadableImageError, to_rgb
from comad.data.images import SPLIT_NAMES, ImageSet, Source, Splits

SAMPLED = 64
"""Images whose pixels the fingerprint looks at."""
IMAGE_KEYS, LABEL_KEYS = ("image", "img", "pixels"), ("label", "labels", "fine_label")


class DatasetImages(ImageSet):
    """Images of a dataset with a length and random access.

    An item is an image, a tuple that begins with one, or a dict with one under ``image`` or ``img``. An image is a PIL
    image, or a uint8 tensor or array (3, h, w) or (1, h, w); floats are refused, for whether they are normalised is
    unknown. Items must not be random, or views are no function of the seed.

    The fingerprint is of the number of images, their labels and the pixels of 64 of them, evenly spread: it tells data
    sets apart, and misses a change of one image among many.
    """

    def __init__(self, name: str, dataset: Any, indices: np.ndarray | None = None, labels: Tensor | None = None):
        self.name = name
        self.dataset = dataset
        self.indices = np.arange(len(dataset)) if indices is None else indices
        self.labels = {} if labels is None else {"fine": labels[torch.from_numpy(self.indices)]}
        self.groups = torch.arange(len(self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return f"image {self.indices[index]} of {self.name}"

    def key(self, index: int) -> str:
        """See `ImageSet.key`: the number of the image in the dataset."""
        return str(self.indices[index])

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`. Whatever the dataset raises for an item makes it unreadable."""
        try:
            return _to_tensor(_image_of(self.dataset[int(self.indices[index])]))
        except Exception as error:
            raise UnreadableImageError(f"{self.path(index)}: {str(error) or type(error).__name__}") from error

    def content_numbers(self) -> np.ndarray:
        """See `ImageSet.content_numbers`: a hash of the pixels of 64 images, 0 for the others."""
        numbers = np.zeros(len(self), dtype=np.int64)
        for index in np.unique(np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int)):
            try:
                pixels = self.load(int(index))
            except UnreadableImageError:
                numbers[index] = -1
                continue
            content = repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()
            numbers[index] = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
        return numbers


def load_objects(data: Any, labels: Any = None) -> Splits:
    """Make splits of a dataset, or of a dict with ``train`` and ``val`` or ``test``.

    One dataset alone is split by a hash of the numbers of its images, a tenth each for val and test. Of a dict without
    ``test``, ``val`` is the test; without ``val``, a tenth of ``train`` is held out. Labels are those of ``labels``,
    else ``dataset.targets``, else a column ``label``; class names are ``dataset.classes``, else numbers. Items are not
    asked for labels, for that would decode every image.

    Raises:
        ValueError: no dataset, an empty one, other names, or labels that do not fit.
    """
    sets: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"train": data}
    if "train" not in sets or sets.keys() - set(SPLIT_NAMES):
        raise ValueError(f"a dict of datasets has train and val or test, not {', '.join(map(str, sets)) or 'nothing'}.")
    if labels is not None and len(sets) > 1:
        raise ValueError("labels are for one dataset; give each of a dict its own as dataset.targets.")
    for dataset in sets.values():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
            raise ValueError(
                f"{type(dataset).__name__} is no path, and no dataset with a length; pass a folder, name or dataset."
            )
    known = {name: _labels_of(dataset, labels) for name, dataset in sets.items()}
    if any(found is not None for found in known.values()):
        known = {name: torch.full((len(sets[name]),), -1) if found is None else found for name, found in known.items()}
    chosen, how = _choose(sets)
    train, val, test = (
        DatasetImages(f"dataset/{part}", sets[name], indices, known[name])
        for part, (name, indices) in zip(SPLIT_NAMES, chosen, strict=True)
    )
    return Splits(train, val, test, _class_names(sets["train"], known), "your own", Source(how))


def _choose(sets: dict[str, Any]) -> tuple[list[tuple[str, np.ndarray]], str]:
    """For each part the dataset and the images of it, and how that came about."""
    whole = {name: np.arange(len(dataset)) for name, dataset in sets.items()}
    buckets = np.array([_bucket(index) for index in range(len(sets["train"]))])
    if len(sets) == 1:
        cuts = buckets >= 0.2, buckets < 0.1, (buckets >= 0.1) & (buckets < 0.2)
        how = "by a hash of each number about 80, 10 and 10 % are train, val and test"
        return [("train", whole["train"][cut]) for cut in cuts], how
    test = "test" if "test" in sets else "val"
    if len(sets) == 3:
        return [(name, whole[name]) for name in SPLIT_NAMES], "as given"
    parts = [("train", whole["train"][buckets >= 0.1]), ("train", whole["train"][buckets < 0.1]), (test, whole[test])]
    return parts, f"train is the rest of train, val is a tenth of train, by a hash of each number, test is {test}"


def _bucket(index: int) -> float:
    digest = hashlib.blake2b(str(index).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32


def _labels_of(dataset: Any, labels: Any) -> Tensor | None:
    """int64 (n,), negative where unlabelled; None without labels."""
    found = labels if labels is not None else getattr(dataset, "targets", None)
    columns = getattr(dataset, "column_names", None)
    if found is None and isinstance(columns, list):  # Hugging Face: a column is read without the images
        name = next((key for key in LABEL_KEYS if key in columns), None)
        found = None if name is None else list(dataset[name])
    if found is None:
        return None
    numbers = torch.as_tensor(np.asarray(found, dtype=np.int64))
    if numbers.shape != (len(dataset),):
        raise ValueError(f"{tuple(numbers.shape)} labels for {len(dataset)} images; give one number per image.")
    return numbers.clamp(min=-1)


def _class_names(dataset: Any, known: Mapping[str, Tensor | None]) -> dict[str, tuple[str, ...]]:
    count = max((int(labels.max()) + 1 for labels in known.values() if labels is not None), default=0)
    names = [str(name) for name in getattr(dataset, "classes", None) or []]
    return {"fine": tuple(names if len(names) >= count else map(str, range(count)))} if count else {}


def _image_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next(item[key] for key in IMAGE_KEYS if key in item)
    return item[0] if isinstance(item, (tuple, list)) else item


def _to_tensor(image: Any) -> Tensor:
    """uint8 (3, h, w) of a PIL image, or of a tensor or array with the channels first."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(to_rgb(image)).permute(2, 0, 1)
    pixels = torch.as_tensor(image)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) not in (1, 3) or not pixels.numel():
        raise ValueError(f"{pixels.dtype} {tuple(pixels.shape)} is no image; give PIL images or uint8 (3, h, w)")
    return pixels.expand(3, -1, -1)
