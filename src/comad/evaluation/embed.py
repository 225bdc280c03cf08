"""The verb `comad embed`: features of every image of a folder as a table, and the nearest neighbours of an image."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from comad.data.folders import FolderImages
from comad.data.images import ImageSet, Splits, UnreadableImageError
from comad.data.load import DataConfig
from comad.data.loader import LoaderConfig
from comad.data.transforms import evaluation_view
from comad.evaluation.features import evaluating, pool_tokens
from comad.evaluation.views import device, load_one, view_size
from comad.models.backbone import Backbone
from comad.models.files import sha256
from comad.models.teachers import Teacher
from comad.runtime.atomic import check_name, replacing
from comad.runtime.progress import Working, warn
from comad.runtime.seal import is_intact, sealed
from comad.runtime.spelling import hint

ENDINGS = (".parquet", ".npy")
PART_IMAGES = 4096
"""Images whose features are written at once: what a killed run loses at most."""
COLUMNS = ("path", "split", "label", "coarse")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(DataConfig):
    """Encode every image of a folder and write features, paths and labels. The same command again goes on.

    Args:
        backbone: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        out: the table: NAME.parquet; or NAME.npy, with paths and labels in NAME.csv.
        image_size: pixels on the side of the view; left out, 224, and on stamps as many as give 6 × 6 patches.
        pool: what stands for an image, cls or patch (the mean patch token); left out, the class token if it was
            trained.
        batch_size: images per forward.
        nearest: an image; the images whose features are nearest to its own are listed.
        top: how many of them.
        loader: how images are read.
    """

    backbone: str = ""
    out: str = "features.parquet"
    image_size: int | None = None
    pool: Literal["cls", "patch"] | None = None
    batch_size: int = 64
    nearest: str | None = None
    top: int = 10
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; use 1 or more.")


class Neighbour(NamedTuple):
    """An image that is near: its cosine, its path and its label, empty if it has none."""

    cosine: float
    path: str
    label: str


class Embedded(NamedTuple):
    """A table of features on the disk: where, how many rows, how many images could not be read, its seconds."""

    path: Path
    rows: int
    width: int
    unreadable: int
    seconds: float


def embed(config: EmbedConfig) -> str:
    """Write the table, unless it is there already, and list the neighbours of ``config.nearest``. Returns it in words.

    Raises:
        ValueError: the backbone, the data or the image cannot be loaded, ``out`` has another ending, the pool is one
            that the backbone has not, or pyarrow is missing.
    """
    if not config.backbone:
        raise ValueError("name what to encode with: comad embed BACKBONE --data FOLDER --out features.parquet.")
    out = check_place(config.out)
    photo = _one_image(config.nearest) if config.nearest else None
    splits = config.load_images()
    teacher = load_one(config.backbone, config.data, config.image_size)
    pool, backbone = choose_pool(teacher.backbone, config.pool), teacher.backbone.to(device())
    done = embed_images(backbone, splits, out, pool=pool, config=config, name=_identity_of(teacher))
    speed = f", {done.rows / done.seconds:.0f} images/s" if done.seconds else "; they were there already"
    lines = [teacher.card.summary(), f"{done.rows:,} features of width {done.width} ({pool}) are in {out}{speed}."]
    if done.unreadable:
        lines.append(f"{done.unreadable:,} images cannot be read and were left out; restore or remove them.")
    if photo is not None:
        feature = next(encode(backbone, photo, [0], view_size(backbone), pool, config))[0][0]
        found = nearest(out, feature, config.top)
        lines += ["", *(f"{hit.cosine:.4f}  {hit.path}" + (f"  ({hit.label})" if hit.label else "") for hit in found)]
    return "\n".join(lines)


def check_place(out: str) -> Path:
    """The path of the table.

    Raises:
        ValueError: its ending is none of `ENDINGS`, it is a folder, what writes it is not installed, or a file beside a
            .npy is somebody else's.
    """
    path = Path(out)
    if path.suffix not in ENDINGS:
        raise ValueError(f"--out {out!r} ends in {path.suffix or 'nothing'!r}; {hint(path.suffix, ENDINGS)}")
    if path.is_dir():
        raise ValueError(f"--out {out!r} is a folder; name a file.")
    check_name(path, "--out")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"--out {out!r} needs pyarrow; run: pip install 'comad[parquet]', or name a .npy file.")
    beside = [path.with_suffix(ending) for ending in (".csv", ".json")] if path.suffix == ".npy" else []
    if not path.exists() and (taken := [str(other) for other in beside if other.exists()]):
        raise ValueError(f"--out {out!r} would write over {taken[0]}; name another file.")
    return path


def choose_pool(backbone: Backbone, wanted: str | None) -> Literal["cls", "patch"]:
    """What stands for an image.

    Raises:
        ValueError: the class token is wanted, and none was trained.
    """
    has_cls = "cls" in backbone.token_types
    if wanted == "cls" and not has_cls:
        raise ValueError("this backbone has no trained class token; leave out --pool, or pass --pool patch.")
    return "patch" if wanted == "patch" or not has_cls else "cls"


def embed_images(
    backbone: Backbone, splits: Splits, out: Path, *, pool: Literal["cls", "patch"], config: EmbedConfig, name: str
) -> Embedded:
    """Encode every image of every split, in parts that survive a kill, and join them to one table.

    Args:
        backbone: on the device to compute on.
        splits: images; rows are in the order train, val, test.
        out: the table.
        pool: what stands for an image.
        config: batch size and loader.
        name: what tells these weights from others; parts and a table of others are not used.
    """
    size, start = view_size(backbone), time.perf_counter()
    identity = _identity(splits, name, size, pool)
    if (facts := _facts(out)).get("identity") == identity:
        return Embedded(out, facts["rows"], facts["width"], facts["unreadable"], 0.0)
    parts = _open_parts(out, identity)
    rows = _Rows(splits)
    with Working("embedding", len(rows), "images") as told:
        for number, first in enumerate(range(0, len(rows), PART_IMAGES)):
            path = parts / f"{number:06}.npz"
            last = min(first + PART_IMAGES, len(rows))
            if not _is_whole(path, range(first, last), backbone.width):
                _write_part(path, _encode_part(backbone, rows, range(first, last), size, pool, config, told))
            told.advance(last - told.done)
    unreadable = _join(out, parts, rows, backbone.width, {"identity": identity, "pool": pool, "image_size": size})
    shutil.rmtree(parts)
    return Embedded(out, len(rows) - unreadable, backbone.width, unreadable, time.perf_counter() - start)


def encode(
    backbone: Backbone, images: ImageSet, indices: Sequence[int], image_size: int, pool: str, config: EmbedConfig
) -> Iterator[tuple[Float[np.ndarray, "b width"], np.ndarray]]:
    """Encode images in order, decoded ahead by the loader's workers: features, and which could be read."""
    workers = config.loader.num_workers if len(indices) > 2 * config.batch_size else 0
    loader = DataLoader(
        EvaluationViews(images, indices, image_size),
        batch_size=config.batch_size,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    with evaluating(backbone) as place, torch.inference_mode():
        for views, readable in loader:
            tokens = backbone(views.to(place, non_blocking=True).float().div_(255))
            yield pool_tokens(tokens)[pool].cpu().numpy(), readable.numpy()


def nearest(table: Path, feature: Float[np.ndarray, " width"], top: int) -> list[Neighbour]:
    """The rows of a table whose cosine with a feature is largest, read piece by piece; equal ones in their order.

    Raises:
        ValueError: the table is damaged.
    """
    query = feature / max(float(np.linalg.norm(feature)), 1e-12)
    best: list[Neighbour] = []
    try:
        for features, paths, labels in _pieces(table):
            similar = features @ query / np.maximum(np.linalg.norm(features, axis=1), 1e-12)
            order = np.argsort(-similar, kind="stable")[:top]
            best += [Neighbour(float(similar[i]), paths[i], labels[i]) for i in order]
            best = sorted(best, key=lambda hit: -hit.cosine)[:top]
    except Exception as error:  # pyarrow and NumPy have many kinds of errors for damaged files
        raise ValueError(f"{table} is damaged; remove it, and the same command writes it again.") from error
    return best


class EvaluationViews(Dataset[tuple[Tensor, bool]]):
    """Evaluation views as uint8, and whether the file could be read."""

    def __init__(self, images: ImageSet, indices: Sequence[int], image_size: int):
        self.images, self.indices, self.image_size = images, indices, image_size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, bool]:
        crop = self.images.eval_crop
        try:
            image = self.images.load(int(self.indices[position]), round(self.image_size / crop))
        except UnreadableImageError:
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), False
        return evaluation_view(image, self.image_size, crop), True


class _Rows(ImageSet):
    """The images of all splits one after another, and what is known about each."""

    def __init__(self, splits: Splits):
        self.splits, self.parts = splits, [splits.train, splits.val, splits.test]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self.eval_crop = splits.train.eval_crop

    def __len__(self) -> int:
        return int(self.starts[-1])

    def load(self, index: int, min_side: int = 0) -> Tensor:
        part = self._part(index)
        return self.parts[part].load(index - int(self.starts[part]), min_side)

    def path(self, index: int) -> str:
        part = self._part(index)
        return self.parts[part].path(index - int(self.starts[part]))

    def row(self, index: int) -> tuple[str, str, str, str]:
        """Path, split, label, coarse label; an unknown label is empty."""
        part = self._part(index)
        own, images = index - int(self.starts[part]), self.parts[part]
        labels = []
        for name in ("fine", "coarse"):
            number = int(images.labels[name][own]) if name in images.labels else -1
            labels.append(self.splits.class_names[name][number] if number >= 0 else "")
        return images.path(own), ("train", "val", "test")[part], labels[0], labels[1]

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1


def _one_image(path: str) -> FolderImages:
    """A set of one image.

    Raises:
        ValueError: it cannot be read.
    """
    image = FolderImages("query", Path(path).parent, [Path(path).name], None)
    try:
        image.load(0)
    except UnreadableImageError as error:
        raise ValueError(f"--nearest {error}; name an image.") from error
    return image


def _identity_of(teacher: Teacher) -> str:
    return f"{teacher.card.architecture} {teacher.card.sha256}"


def _identity(splits: Splits, name: str, size: int, pool: str) -> str:
    """A hash of all that the features depend on."""
    prints = [images.fingerprint() for images in (splits.train, splits.val, splits.test)]
    return hashlib.sha256(json.dumps([name, size, pool, splits.train.eval_crop, *prints]).encode()).hexdigest()


def _open_parts(out: Path, identity: str) -> Path:
    """The folder of the parts; those of other weights, images or views are removed."""
    folder = out.with_name(f".{out.name}.parts")
    marker = folder / "identity"
    if not marker.is_file() or marker.read_bytes() != identity.encode():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(identity, encoding="utf-8")
    return folder


def _encode_part(
    backbone: Backbone,
    rows: _Rows,
    span: range,
    size: int,
    pool: str,
    config: EmbedConfig,
    told: Working,
) -> tuple[np.ndarray, np.ndarray]:
    features = np.empty((len(span), backbone.width), dtype=np.float32)
    readable = np.empty(len(span), dtype=bool)
    start = 0
    for values, known in encode(backbone, rows, span, size, pool, config):
        features[start : start + len(values)], readable[start : start + len(values)] = values, known
        start += len(values)
        told.advance(len(values))
    return features[readable], span.start + readable.nonzero()[0]


def _write_part(path: Path, part: tuple[np.ndarray, np.ndarray]) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, features=part[0], index=part[1])


def _is_whole(path: Path, span: range, width: int) -> bool:
    """Whether a part is there; one that is damaged is told, and made again."""
    if not path.exists():
        return False
    try:
        with np.load(path) as part:  # each array has a checksum
            features, index = part["features"], part["index"]
        if features.shape == (len(index), width) and np.isin(index, span).all():
            return True
    except Exception:  # zipfile, zlib and NumPy have a dozen kinds of errors for damaged files
        pass
    warn(f"{path} is damaged; its images are encoded again.")
    return False


def _read_parts(parts: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for path in sorted(parts.glob("*.npz")):
        with np.load(path) as part:
            yield part["features"], part["index"]


def _join(out: Path, parts: Path, rows: _Rows, width: int, facts: dict[str, Any]) -> int:
    """Write the table from its parts. Returns how many images are not in it."""
    count = sum(len(index) for _, index in _read_parts(parts))
    facts = {**facts, "rows": count, "width": width, "unreadable": len(rows) - count}
    if out.suffix == ".parquet":
        _join_parquet(out, parts, rows, width, facts)
    else:
        _join_npy(out, parts, rows, width, facts)
    return facts["unreadable"]


def _join_parquet(out: Path, parts: Path, rows: _Rows, width: int, facts: dict[str, Any]) -> None:
    """One row group per part; the facts are in the metadata of the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [pa.field(name, pa.string()) for name in COLUMNS]
    fields.append(pa.field("feature", pa.list_(pa.float32(), width)))
    schema = pa.schema(fields, metadata={"comad": json.dumps(facts)})
    with replacing(out) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        for features, index in _read_parts(parts):
            columns = [pa.array(column, pa.string()) for column in _columns(rows, index)]
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), width)
            writer.write_table(pa.Table.from_arrays([*columns, values], schema=schema))


def _join_npy(out: Path, parts: Path, rows: _Rows, width: int, facts: dict[str, Any]) -> None:
    """An array, a table of paths and labels row by row, and the facts, which are written last."""
    out.with_suffix(".json").unlink(missing_ok=True)
    with replacing(out) as partial:
        table = open_memmap(partial, mode="w+", dtype=np.float32, shape=(facts["rows"], width))
        start = 0
        for features, _ in _read_parts(parts):
            table[start : start + len(features)] = features
            start += len(features)
        table.flush()
    with replacing(out.with_suffix(".csv")) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for _, index in _read_parts(parts):
            writer.writerows(zip(*_columns(rows, index), strict=True))
    with replacing(out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(sealed({**facts, "sha256": sha256(out)}), indent=2) + "\n", encoding="utf-8")


def _columns(rows: _Rows, index: np.ndarray) -> list[list[str]]:
    """`COLUMNS` of some rows. A name that is no UTF-8 is written with its bytes escaped."""
    found = [rows.row(int(number)) for number in index]
    return [[row[i].encode("utf-8", "backslashreplace").decode() for row in found] for i in range(len(COLUMNS))]


def _facts(out: Path) -> dict[str, Any]:
    """What a table says about itself; nothing if there is none, or it is not ours. A damaged one is told."""
    if not out.is_file():
        return {}
    try:
        if out.suffix == ".npy":
            facts = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        else:
            import pyarrow.parquet as pq

            facts = json.loads((pq.read_schema(out).metadata or {}).get(b"comad", b"{}"))
        if "identity" not in facts:
            return {}
        sound = out.suffix != ".npy" or (is_intact(facts) and facts["sha256"] == sha256(out))
        if sound and all(isinstance(facts[key], int) for key in ("rows", "width", "unreadable")):
            return facts
    except FileNotFoundError:
        return {}
    except Exception:  # pyarrow has many kinds of errors for damaged files
        pass
    warn(f"{out} is damaged or of another version; it is written again.")
    return {}


def _pieces(table: Path) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
    """Features, paths and labels of a table, a part at a time."""
    if table.suffix == ".npy":
        features = np.load(table, mmap_mode="r")
        with table.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for start in range(0, len(features), PART_IMAGES):
            some = rows[start : start + PART_IMAGES]
            piece = np.asarray(features[start : start + PART_IMAGES])
            yield piece, [row["path"] for row in some], [row["label"] for row in some]
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(table, page_checksum_verification=True) as file:
        for batch in file.iter_batches(PART_IMAGES, columns=["path", "label", "feature"]):
            values = batch.column("feature").flatten().to_numpy().reshape(batch.num_rows, -1)
            yield values, batch.column("path").to_pylist(), batch.column("label").to_pylist()
