"""What a run keeps for its report, beside its log: ``report.npz`` (`collect`), ``facts.json`` (`write_facts`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from comad.runtime.atomic import replacing, write_text
from comad.runtime.seal import sealed

SAMPLES, FACTS = "report.npz", "facts.json"
VERSION = 1
IMAGE_SIDE = 160
"""Longest side in pixels of the images that are kept."""
THUMBNAIL_SIDE = 56
LARGEST_SIDE = 4096
"""Of an image or a map; larger ones are damage."""
TARGET, STUDENT = "target", "student"

Array = np.ndarray | Tensor


class Neighbours(NamedTuple):
    """Nearest training images, for `collect`.

    Attributes:
        numbers: network → (n, k), numbers of the images, the nearest first.
        images: number → uint8 (H, W, 3), for every number.
    """

    numbers: Mapping[str, Int[Array, "n k"]]
    images: Mapping[int, UInt8[Array, "_ _ 3"]]


class Classes(NamedTuple):
    """Classes of the labelled test images, for `collect`.

    Attributes:
        names: of the classes.
        labels: (t,), one per labelled test image, in the order of ``correct`` in ``scores.json``.
        lost: images that a teacher names rightly and the student does not, such as those of `lost_by_student`.
        lost_labels: their classes.
    """

    names: Sequence[str]
    labels: Int[Array, " t"]
    lost: Sequence[UInt8[Array, "_ _ 3"]] = ()
    lost_labels: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The content of ``report.npz``; what was not given is empty. n images, each network with its own h × w patches.

    Attributes:
        images: uint8 (n, H, W, 3).
        masks: network → bool (n, h, w), True where it sees the patch.
        gate: teacher → (n, h, w), its weight in the target at each patch, in [0, 1].
        colours: network → uint8 (n, h, w, 3), see `feature_colours`.
        explained: network → share of its variance that its three directions hold.
        neighbours: network → (n, k) numbers of thumbnails, the nearest first.
        thumbnails: uint8 (T, s, s, 3).
        class_names: of the labels.
        labels: (t,) class of each labelled test image, in the order of ``correct`` in ``scores.json``.
        lost: uint8 (l, s, s, 3), test images that the student lost.
        lost_labels: (l,) their classes.
    """

    images: np.ndarray
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    gate: Mapping[str, np.ndarray] = field(default_factory=dict)
    colours: Mapping[str, np.ndarray] = field(default_factory=dict)
    explained: Mapping[str, int | float] = field(default_factory=dict)
    neighbours: Mapping[str, np.ndarray] = field(default_factory=dict)
    thumbnails: np.ndarray
    class_names: tuple[str, ...] = ()
    labels: np.ndarray
    lost: np.ndarray
    lost_labels: np.ndarray


def collect(
    folder: Path,
    images: Array,
    *,
    masks: Mapping[str, Array] | None = None,
    gate: Mapping[str, Array] | None = None,
    features: Mapping[str, Array] | None = None,
    neighbours: Neighbours | None = None,
    classes: Classes | None = None,
) -> Path:
    """Write ``report.npz`` into a run's folder; a reader never sees half a file. What is left out is not shown.

    Networks are named ``student``, ``target``, and as the teachers are. Their patches are given in one row of
    N = h × w with h = w; N and E may differ from network to network. Features are kept as colours, not as numbers.

    Args:
        folder: of the run.
        images: uint8 (n, H, W, 3), the images that everything is shown on, such as eight of the test images.
        masks: network → bool (n, N), True where it sees the patch; of student and teachers.
        gate: teacher → (n, N), its weight in the target at each patch.
        features: network → its patches (n, N, E); of teachers, target and student.
        neighbours: nearest training images of each image.
        classes: what results per class need.

    Raises:
        ValueError: shapes do not fit each other; nothing is written.
    """
    pixels = _numpy(images)
    _fits("images", pixels, (None, None, None, 3), np.uint8)
    arrays = {"images": np.stack([shrink(image, IMAGE_SIDE) for image in pixels])}
    arrays |= {f"masks/{name}": _grid(_numpy(part).astype(bool), name) for name, part in (masks or {}).items()}
    for name, part in (gate or {}).items():
        arrays[f"gate/{name}"] = np.rint(255 * np.clip(_grid(_numpy(part), name), 0, 1)).astype(np.uint8)
    colours, explained = feature_colours({name: _numpy(part) for name, part in (features or {}).items()})
    arrays |= {f"colours/{name}": part for name, part in colours.items()}
    if neighbours:
        arrays |= _neighbour_arrays(neighbours)
    if classes:
        arrays["labels"], arrays["lost_labels"] = _numpy(classes.labels), np.asarray(classes.lost_labels, np.int64)
        if len(classes.lost):
            arrays["lost"] = np.stack([square(_numpy(image)) for image in classes.lost])
    about = {"version": VERSION, "explained": explained, "class_names": list(classes.names) if classes else []}
    _samples(arrays, about)
    arrays["about"] = np.array(json.dumps(about))
    with replacing(folder / SAMPLES) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    return folder / SAMPLES


def read_samples(path: Path) -> Samples:
    """Read what `collect` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or was written by another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']} of the format, this comad reads {VERSION}")
        return _samples(arrays, about)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy have a dozen kinds of errors for damaged files
        raise ValueError(" ".join(str(error).split())) from error


def write_facts(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write ``facts.json``, plain values that no other file of a run holds; a reader never sees half a file.

    Args:
        folder: of the run.
        facts: any of ``command``: text. ``changed``: see `changed_options`. ``data``, ``cost``: word → value.
            ``exports``: a list of word → value, such as format, file, size, fidelity, latency.
    """
    write_text(folder / FACTS, json.dumps(sealed(facts), indent=1) + "\n")
    return folder / FACTS


def changed_options(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The options, as nested plain values, that differ from the default: dotted name → [value, default]."""
    ours, theirs = leaves(config), leaves(default)
    return {key: [value, theirs.get(key)] for key, value in ours.items() if key not in theirs or value != theirs[key]}


def leaves(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


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


def lost_by_student(teacher: Bool[Array, " n"], student: Bool[Array, " n"], limit: int = 16) -> Int[np.ndarray, " l"]:
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
    variances, directions = np.linalg.eigh(flat.T @ flat / len(flat))
    variances, directions = variances[::-1].clip(min=0), directions[:, ::-1]
    total, shown = float(variances.sum()), variances[:3]
    kept = np.flatnonzero(shown > 1e-12 * total)
    scores = np.zeros((len(flat), 3))
    scores[:, kept] = flat @ directions[:, kept] / np.sqrt(shown[kept])
    return scores.reshape(*patches.shape[:-1], 3), float(shown.sum()) / total if total else 0.0


def _grid(part: np.ndarray, name: str, axis: int = -1) -> np.ndarray:
    """(…, N, …) → (…, h, w, …)."""
    axis %= part.ndim
    side = math.isqrt(part.shape[axis])
    if side * side != part.shape[axis]:
        raise ValueError(f"{name!r} has {part.shape[axis]} patches, which are no square grid.")
    return part.reshape(*part.shape[:axis], side, side, *part.shape[axis + 1 :])


def _neighbour_arrays(neighbours: Neighbours) -> dict[str, np.ndarray]:
    """Each thumbnail once, and the networks' lists as numbers of thumbnails."""
    lists = {name: _numpy(part).astype(np.int64) for name, part in neighbours.numbers.items()}
    wanted = np.unique(np.concatenate([part.ravel() for part in lists.values()]))
    missing = [int(number) for number in wanted if int(number) not in neighbours.images]
    if missing:
        raise ValueError(f"the images of the neighbours lack number {missing[0]}.")
    found = {f"neighbours/{name}": np.searchsorted(wanted, part) for name, part in lists.items()}
    return {**found, "thumbnails": np.stack([square(_numpy(neighbours.images[int(number)])) for number in wanted])}


def _samples(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Samples:
    """Samples of what stands in the file, if it fits together."""
    n, none, number = len(arrays["images"]), np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int64)
    shapes = {
        "masks": ((n, None, None), np.bool_),
        "gate": ((n, None, None), np.uint8),
        "colours": ((n, None, None, 3), np.uint8),
        "neighbours": ((n, None), np.integer),
        "images": ((n, None, None, 3), np.uint8),
        "thumbnails": ((None, None, None, 3), np.uint8),
        "lost": ((None, None, None, 3), np.uint8),
        "labels": ((None,), np.integer),
        "lost_labels": ((len(arrays.get("lost", none)),), np.integer),
    }
    for key, part in arrays.items():
        _fits(key, part, *shapes[key.partition("/")[0]])
    families = {name: _family(arrays, f"{name}/") for name in ("masks", "gate", "colours", "neighbours")}
    thumbnails, names = arrays.get("thumbnails", none), tuple(map(str, about["class_names"]))
    for part in families["neighbours"].values():
        _within("neighbours", part, len(thumbnails))
    for key in ("labels", "lost_labels"):
        _within(key, arrays.get(key, number), len(names))
    return Samples(
        images=arrays["images"],
        masks=families["masks"],
        gate={name: part.astype(np.float32) / 255 for name, part in families["gate"].items()},
        colours=families["colours"],
        explained={str(name): float(value) for name, value in about["explained"].items()},
        neighbours=families["neighbours"],
        thumbnails=thumbnails,
        class_names=names,
        labels=arrays.get("labels", number),
        lost=arrays.get("lost", none),
        lost_labels=arrays.get("lost_labels", number),
    )


def _family(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): part for key, part in arrays.items() if key.startswith(prefix)}


def _within(name: str, numbers: np.ndarray, limit: int) -> None:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < limit:
        raise ValueError(f"{name} has numbers outside 0 to {limit - 1}.")


def _fits(name: str, part: np.ndarray, shape: tuple[int | None, ...], kind: Any) -> None:
    right = len(part.shape) == len(shape) and all(b in (None, a) for a, b in zip(part.shape, shape, strict=True))
    right &= part.ndim == 1 or 0 < min(part.shape) <= max(part.shape) <= LARGEST_SIDE
    if not right or not np.issubdtype(part.dtype, kind):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {part.dtype} {part.shape}; it must be {kind.__name__} ({wanted}).")


def _numpy(part: Any) -> np.ndarray:
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu()
        return (part.float() if part.is_floating_point() else part).numpy()
    return np.asarray(part)
