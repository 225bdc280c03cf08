"""What a run keeps for its report, beside logs and scores: ``report.npz``, written by `collect`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

FILE = "report.npz"
VERSION = 1
IMAGE_SIDE = 160
"""Longest side in pixels of the images that are kept."""
THUMBNAIL_SIDE = 56
TARGET, STUDENT = "target", "student"

Array = np.ndarray | Tensor


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The content of ``report.npz``; what was not given is None or empty. n images, M teachers, grids of h × w patches.

    Attributes:
        images: uint8 (n, H, W, 3).
        teachers: names, in the order of ``teacher_masks`` and ``gate``.
        student_mask: bool (n, h, w), True where the student sees the patch.
        teacher_masks: bool (M, n, h, w).
        gate: (M, n, h, w), the weights of the teachers at each patch, in [0, 1].
        colours: network → uint8 (n, h, w, 3), see `feature_colours`.
        explained: network → share of its variance that its three directions hold.
        neighbours: network → (n, k) numbers of thumbnails, the nearest first.
        thumbnails: uint8 (T, s, s, 3).
        labels: (t,) class of each labelled test image, in the order of ``correct`` in ``scores.json``.
        class_names: of the labels.
        lost: uint8 (l, s, s, 3), test images that a teacher names rightly and the student does not.
        lost_labels: (l,) their classes.
        facts: plain values; see `collect`.
    """

    images: np.ndarray
    teachers: tuple[str, ...]
    student_mask: np.ndarray | None = None
    teacher_masks: np.ndarray | None = None
    gate: np.ndarray | None = None
    colours: Mapping[str, np.ndarray] = field(default_factory=dict)
    explained: Mapping[str, float] = field(default_factory=dict)
    neighbours: Mapping[str, np.ndarray] = field(default_factory=dict)
    thumbnails: np.ndarray | None = None
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    lost: np.ndarray | None = None
    lost_labels: np.ndarray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def collect(
    folder: Path,
    *,
    images: UInt8[Array, "n H W 3"],
    teachers: Sequence[str],
    student_mask: Bool[Array, "n N"] | None = None,
    teacher_masks: Bool[Array, "M n N"] | None = None,
    gate: Float[Array, "M n N"] | None = None,
    features: Mapping[str, Float[Array, "n _ _"]] | None = None,
    neighbours: Mapping[str, Int[Array, "n k"]] | None = None,
    neighbour_images: Mapping[int, UInt8[Array, "_ _ 3"]] | None = None,
    labels: Int[Array, " t"] | None = None,
    class_names: Sequence[str] = (),
    lost_images: Sequence[UInt8[Array, "_ _ 3"]] = (),
    lost_labels: Sequence[int] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.npz`` into a run's folder; a reader never sees half a file. Only the first two are required.

    Patches are given in one row of N = h × w, with h = w. Features are kept as colours, not as numbers.

    Args:
        folder: of the run.
        images: the images that everything is shown on, such as the first eight of the test images.
        teachers: names of the M teachers.
        student_mask: True where the student sees the patch.
        teacher_masks: True where the teacher sees the patch.
        gate: weights of the teachers in the target.
        features: network → its patches (n, N, E); the names of the teachers, ``target`` and ``student``. N and E may
            differ from network to network.
        neighbours: network → numbers of the nearest training images of each image, the nearest first.
        neighbour_images: number → image, for every number in ``neighbours``.
        labels: class of each labelled test image, in the order of ``correct`` in ``scores.json``.
        class_names: of the labels.
        lost_images: some of the images of `lost_by_student`.
        lost_labels: their classes.
        facts: plain values. ``command``: text. ``changed``: option → [value, default]. ``data``, ``cost``: word →
            value. ``exports``: a list of word → value, such as format, file, size, largest difference, latency.

    Raises:
        ValueError: shapes do not fit each other; nothing is written.
    """
    pixels = _numpy(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"images are uint8 (n, H, W, 3), not {pixels.dtype} {pixels.shape}.")
    arrays: dict[str, np.ndarray] = {"images": np.stack([shrink(image, IMAGE_SIDE) for image in pixels])}
    colours, explained = feature_colours({name: _numpy(part) for name, part in (features or {}).items()})
    arrays |= {f"colours/{name}": part for name, part in colours.items()}
    for name, part in (("student_mask", student_mask), ("teacher_masks", teacher_masks)):
        if part is not None:
            arrays[name] = _grid(_numpy(part).astype(bool), name)
    if gate is not None:
        arrays["gate"] = np.rint(255 * np.clip(_grid(_numpy(gate), "gate"), 0, 1)).astype(np.uint8)
    arrays |= _neighbour_arrays(neighbours or {}, neighbour_images or {})
    if labels is not None:
        arrays["labels"] = _numpy(labels)
    if len(lost_images):
        arrays["lost"] = np.stack([square(_numpy(image)) for image in lost_images])
        arrays["lost_labels"] = np.asarray(lost_labels, dtype=np.int64)
    about = {
        "version": VERSION,
        "teachers": list(teachers),
        "explained": explained,
        "class_names": list(class_names),
        "facts": dict(facts or {}),
    }
    _build(arrays, about)
    arrays["about"] = np.array(json.dumps(about))
    path, temporary = folder / FILE, folder / f".{FILE}.{os.getpid()}"
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    os.replace(temporary, path)
    return path


def read_samples(folder: Path) -> Samples:
    """Read what `collect` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or was written by another version.
    """
    path = folder / FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        if about["version"] != VERSION:
            raise ValueError(f"it was written by version {about['version']} of the format, not {VERSION}")
        return _build(arrays, about)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile, MemoryError) as error:
        raise ValueError(f"{FILE} cannot be read: {' '.join(str(error).split())}") from error


def feature_colours(
    features: Mapping[str, Float[np.ndarray, "n _ _"]],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Features as colours in one basis: network → uint8 (n, h, w, 3), and network → share of the variance shown.

    Each network's patches are projected on their three main directions over all images (principal components, each
    scaled to variance 1), then turned so that they match those of the target as well as a rotation can (orthogonal
    Procrustes), the first network's where there is no target. So what looks alike varies alike, whatever the widths.

    Raises:
        ValueError: the patches are no square grid, are not finite, or the numbers of images differ.
    """
    scores, explained = {}, {}
    for name, part in features.items():
        if part.ndim != 3 or not np.isfinite(part).all():
            raise ValueError(f"features of {name!r} are finite numbers of shape (n, N, E), not {part.shape}.")
        scores[name], explained[name] = _principal(_grid(part.astype(np.float64), name, axis=1))
    reference = scores.get(TARGET, next(iter(scores.values()), None))
    colours = {}
    for name, own in scores.items():
        assert reference is not None
        if len(own) != len(reference):
            raise ValueError(f"features of {name!r} are of {len(own)} images, others of {len(reference)}.")
        rows, columns = (np.arange(own.shape[i]) * reference.shape[i] // own.shape[i] for i in (1, 2))
        theirs = reference[:, rows][:, :, columns].reshape(-1, 3)
        u, _, v = np.linalg.svd(own.reshape(-1, 3).T @ theirs)
        colours[name] = np.rint(255 * np.clip((own @ (u @ v)) / 4 + 0.5, 0, 1)).astype(np.uint8)
    return colours, explained


def lost_by_student(
    teacher: Bool[Array, " n"], student: Bool[Array, " n"], limit: int = 16
) -> Int[np.ndarray, " l"]:
    """Numbers of test images that a teacher names rightly and the student does not, evenly over all of them."""
    lost = np.flatnonzero(_numpy(teacher).astype(bool) & ~_numpy(student).astype(bool))
    return lost[np.linspace(0, len(lost) - 1, min(limit, len(lost))).astype(int)]


def shrink(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image, made smaller if it is larger than ``side``."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def square(image: UInt8[np.ndarray, "H W 3"], side: int = THUMBNAIL_SIDE) -> UInt8[np.ndarray, "s s 3"]:
    """The middle of an image as a thumbnail."""
    height, width = image.shape[:2]
    cut = min(height, width)
    top, left = (height - cut) // 2, (width - cut) // 2
    middle = Image.fromarray(image[top : top + cut, left : left + cut])
    return np.asarray(middle.resize((side, side), Image.Resampling.LANCZOS))


def _principal(patches: Float[np.ndarray, "n h w E"]) -> tuple[Float[np.ndarray, "n h w 3"], float]:
    flat = patches.reshape(-1, patches.shape[-1])
    flat = flat - flat.mean(axis=0)
    u, s, _ = np.linalg.svd(flat, full_matrices=False)
    count = min(3, int((s > 1e-9 * max(float(s[0]), 1e-30)).sum()))
    scores = np.zeros((len(flat), 3))
    scores[:, :count] = u[:, :count] * math.sqrt(len(flat))
    total = float((s**2).sum())
    return scores.reshape(*patches.shape[:-1], 3), float((s[:3] ** 2).sum()) / total if total else 0.0


def _grid(part: np.ndarray, name: str, axis: int = -1) -> np.ndarray:
    """(…, N, …) → (…, h, w, …)."""
    axis %= part.ndim
    side = math.isqrt(part.shape[axis])
    if side * side != part.shape[axis]:
        raise ValueError(f"{name!r} has {part.shape[axis]} patches, which are no square grid.")
    return part.reshape(*part.shape[:axis], side, side, *part.shape[axis + 1 :])


def _neighbour_arrays(
    neighbours: Mapping[str, Array], images: Mapping[int, Array]
) -> dict[str, np.ndarray]:
    """Each thumbnail once, and the networks' lists as numbers of thumbnails."""
    if not neighbours:
        return {}
    lists = {name: _numpy(part).astype(np.int64) for name, part in neighbours.items()}
    wanted = np.unique(np.concatenate([part.ravel() for part in lists.values()]))
    missing = [int(number) for number in wanted if int(number) not in images]
    if missing:
        raise ValueError(f"neighbour_images lacks image {missing[0]}, which is a neighbour.")
    found = {f"neighbours/{name}": np.searchsorted(wanted, part) for name, part in lists.items()}
    return {**found, "thumbnails": np.stack([square(_numpy(images[int(number)])) for number in wanted])}


def _build(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Samples:
    """Samples of what stands in the file, if it fits together."""

    def family(name: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(name): part for key, part in arrays.items() if key.startswith(name)}

    images, teachers = arrays["images"], tuple(map(str, about["teachers"]))
    n, m = len(images), len(teachers)
    gate = arrays.get("gate")
    samples = Samples(
        images=images,
        teachers=teachers,
        student_mask=arrays.get("student_mask"),
        teacher_masks=arrays.get("teacher_masks"),
        gate=None if gate is None else gate.astype(np.float32) / 255,
        colours=family("colours/"),
        explained={str(name): float(value) for name, value in about["explained"].items()},
        neighbours=family("neighbours/"),
        thumbnails=arrays.get("thumbnails"),
        labels=arrays.get("labels"),
        class_names=tuple(map(str, about["class_names"])),
        lost=arrays.get("lost"),
        lost_labels=arrays.get("lost_labels"),
        facts=dict(about["facts"]),
    )
    _fits("images", images, (n, None, None, 3), np.uint8)
    _fits("student_mask", samples.student_mask, (n, None, None), np.bool_)
    _fits("teacher_masks", samples.teacher_masks, (m, n, None, None), np.bool_)
    _fits("gate", gate, (m, n, None, None), np.uint8)
    for name, part in samples.colours.items():
        _fits(f"colours/{name}", part, (n, None, None, 3), np.uint8)
    _fits("thumbnails", samples.thumbnails, (None, None, None, 3), np.uint8)
    for name, part in samples.neighbours.items():
        _fits(f"neighbours/{name}", part, (n, None), np.integer)
        if samples.thumbnails is None or (part.size and not 0 <= part.min() <= part.max() < len(samples.thumbnails)):
            raise ValueError(f"neighbours/{name} names thumbnails that are not there")
    _fits("lost", samples.lost, (None, None, None, 3), np.uint8)
    _fits("lost_labels", samples.lost_labels, (0 if samples.lost is None else len(samples.lost),), np.integer)
    _labels_named(samples)
    return samples


def _labels_named(samples: Samples) -> None:
    _fits("labels", samples.labels, (None,), np.integer)
    for part in (samples.labels, samples.lost_labels):
        if part is not None and part.size and not 0 <= part.min() <= part.max() < len(samples.class_names):
            raise ValueError("labels are numbers of class_names")


def _fits(name: str, part: np.ndarray | None, shape: tuple[int | None, ...], kind: Any) -> None:
    if part is None:
        return
    right = len(part.shape) == len(shape) and all(b in (None, a) for a, b in zip(part.shape, shape, strict=True))
    if not right or not np.issubdtype(part.dtype, kind):
        wanted = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {part.dtype} {part.shape}, not {np.dtype(kind).name if kind != np.integer else 'whole numbers'} ({wanted})")


def _numpy(part: Any) -> np.ndarray:
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu()
        return (part.float() if part.is_floating_point() else part).numpy()
    return np.asarray(part)
