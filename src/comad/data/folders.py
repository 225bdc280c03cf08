"""Own folders of images: which part and which label each file has."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from comad.data.decoding import HEIF_ENDINGS, endings, load_file
from comad.data.identity import file_size, normalised
from comad.data.images import SPLIT_NAMES, ImageSet, Source, Splits
from comad.data.index import FolderIndex, PathTable, index_folder
from comad.data.summary import some

PART_NAMES = {"training": "train", "testing": "test", **{name: name for name in SPLIT_NAMES}}
PART_NAMES |= dict.fromkeys(("valid", "validation", "dev", "development"), "val")
"""Spellings of the parts; capitals and a year behind (``val2017``) do not matter."""
LABEL_SETS = ("fine", "coarse")
LabelsOf = Callable[[str], tuple[str | None, ...]]
SEVERAL = "|"
"""Stands between the labels of one image in a cell of a CSV file."""
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")


class FolderImages(ImageSet):
    """Image files below a folder. ``labels``: label set → label of each file."""

    def __init__(self, name: str, root: Path, files: Sequence[str], labels: dict[str, Tensor] | None = None):
        self.name = name
        self.root = root
        self.files = PathTable(files)
        self.labels = labels or {}
        self.groups = torch.arange(len(files))

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return str(self.root / self.files[index])

    def key(self, index: int) -> str:
        """See `ImageSet.key`: the path relative to the folder."""
        return self.files[index]

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`."""
        return load_file(self.path(index), min_side)

    def content_numbers(self) -> np.ndarray:
        """See `ImageSet.content_numbers`: sizes in bytes, -1 of a file that is gone or empty."""
        prefix = os.path.join(self.root, "")
        return np.fromiter((file_size(prefix + file) for file in self.files), dtype=np.int64, count=len(self))


def load_folder(
    root: Path,
    label_depth: int = 1,
    labels: str | Path | None = None,
    subset: str | Path | None = None,
    index: FolderIndex | None = None,
) -> Splits:
    """Open a folder of images.

    It may hold ``train`` and ``val`` or ``test`` sub-folders, also spelt as in `PART_NAMES`. Without a test folder,
    ``val`` is the test and a tenth of ``train`` is held out. Without either, images are split by a hash of their path,
    so that the split stays the same when files are added; so are those of ``train`` where nothing lies beside it.
    Labels are the names of the sub-folders, if most training images lie in some; an image that lies in none has no
    label. Names are compared in Unicode's form NFC. The options are those of `load_images`; ``index`` is what
    lies below the folder, if that is known.

    Raises:
        ValueError: no image, two sub-folders for the same part, or a list that fits no image.
    """
    index = index or index_folder(root)
    if not index.files:
        raise ValueError(
            f"no images below {str(root)!r}; expected files ending in {', '.join(endings())}{_hint(index)}."
        )
    notes = (f"Folders of the system are ignored: {some(index.ignored)}.",) if index.ignored else ()

    def build(part: str, files: list[str], labels: dict[str, Tensor]) -> FolderImages:
        return FolderImages(f"{root.name}/{part}", root, files, labels)

    splits = split_files(root, index.files, build, LabelOptions(label_depth, labels, subset))
    source = splits.source
    return splits._replace(source=Source(source.split, index.left_out, source.notes + notes))


class LabelOptions(NamedTuple):
    """Those of `load_images`. ``labels`` may also be a table of path → label."""

    label_depth: int = 1
    labels: str | Path | Mapping[str, str] | None = None
    subset: str | Path | None = None


def split_files(
    root: Path,
    files: list[str],
    build: Callable[[str, list[str], dict[str, Tensor]], ImageSet],
    options: LabelOptions,
) -> Splits:
    """Put relative paths into parts, give them labels, and build the sets; see `load_folder`."""
    parts = _find_parts(root, files)
    notes = list(parts.notes)
    chosen = parts.files if options.subset is None else _read_subset(Path(options.subset), files, parts, notes)
    if options.labels is None:
        sets, labels_of = _labels_from_folders(parts.depth, options.label_depth)
    elif isinstance(options.labels, Mapping):
        sets, labels_of = _labels_from_table(options.labels)
    else:
        sets, labels_of = _labels_from_csv(Path(options.labels), parts.depth, files, notes)
    listed = _hash_split(chosen[0], labels_of) if parts.hashed else chosen
    labelled = isinstance(options.labels, (str, Path)) or _are_labelled(listed[0] or files, labels_of)
    numbered, class_names = _number(sets if labelled else (), labels_of, listed)
    train, val, test = map(build, SPLIT_NAMES, listed, numbered)
    source = Source(parts.told(labelled), {}, tuple(notes))
    return Splits(train, val, test, class_names, "your own", source)


def _number(
    sets: tuple[str, ...], labels_of: LabelsOf, parts: list[list[str]]
) -> tuple[list[dict[str, Tensor]], dict[str, tuple[str, ...]]]:
    """Labels of each part as numbers, and what the numbers stand for."""
    words = [[labels_of(file) for file in part] for part in parts]
    numbered: list[dict[str, Tensor]] = [{} for _ in parts]
    class_names = {}
    for place, name in enumerate(sets):
        known = sorted({row[place] for part in words for row in part} - {None}, key=str)
        number = {label: i for i, label in enumerate(known)}
        class_names[name] = tuple(map(str, known))
        for labels, part in zip(numbered, words, strict=True):
            labels[name] = torch.tensor([number.get(row[place], -1) for row in part], dtype=torch.int64)
    return numbered, class_names


class _Parts(NamedTuple):
    """Files of each part, how deep the labels lie, and where the parts come from; one list if they are to be hashed."""

    files: list[list[str]]
    depth: int
    folders: dict[str, str]
    notes: list[str]

    @property
    def hashed(self) -> bool:
        return len(self.files) == 1

    def told(self, labelled: bool) -> str:
        """How the parts were made."""
        if self.hashed:
            shares = "80, 10 and 10 % are train, val and test" if labelled else "95 and 5 % are train and val"
            return f"by a hash of each path about {shares}"
        names = {part: folder for folder, part in self.folders.items()}
        sources = {
            "train": f"{names['train']}/",
            "val": f"{names.get('val', '')}/",
            "test": f"{names.get('test', '')}/",
        }
        if "test" not in names:
            sources["test"] = sources["val"]
        if "val" not in names or "test" not in names:
            sources["val"] = f"a tenth of {names['train']}/, by a hash of each path"
            sources["train"] = f"the rest of {names['train']}/"
        return ", ".join(f"{part} is {source}" for part, source in sources.items())


def _find_parts(root: Path, files: list[str]) -> _Parts:
    counts = Counter(file.partition("/")[0] for file in files)
    folders = {top: part for top in sorted(counts) if (part := _part_of(top))}
    named = {part: [f for f in files if folders.get(f.partition("/")[0]) == part] for part in SPLIT_NAMES}
    if not (named["train"] and (named["val"] or named["test"])):
        alone = len(folders) == len(counts) == 1
        notes = (
            []
            if alone
            else [
                f"The folder {top}/ counts as a class, for there are not both train and val or test." for top in folders
            ]
        )
        return _Parts([files], int(alone), {}, notes)
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"{str(root)!r} has two folders for one part: {', '.join(folders)}; merge or rename one.")
    others = {top: count for top, count in counts.items() if top not in folders}
    notes = [f"{sum(others.values())} images outside of the parts are left out: {some(others)}."] if others else []
    return _Parts(_named_parts(named), 1, folders, notes)


def _part_of(folder: str) -> str | None:
    return PART_NAMES.get(re.sub(r"[-_]?(19|20)\d\d$", "", folder.lower()))


def _named_parts(named: dict[str, list[str]]) -> list[list[str]]:
    """Use the folder's own splits. A missing test is all of ``val``; a missing val is a hashed tenth of ``train``."""
    train, val, test = (named[part] for part in SPLIT_NAMES)
    if not test:
        val, test = [], val
    if not val:
        val = [file for file in train if _bucket(file) < 0.1]
        train = [file for file in train if _bucket(file) >= 0.1]
    return [train, val, test]


def _hash_split(files: list[str], labels_of: LabelsOf) -> list[list[str]]:
    val, test = (0.1, 0.2) if _are_labelled(files, labels_of) else (0.05, 0.05)
    buckets = [(file, _bucket(file)) for file in files]
    return [
        [file for file, bucket in buckets if bucket >= test],
        [file for file, bucket in buckets if bucket < val],
        [file for file, bucket in buckets if val <= bucket < test],
    ]


def _bucket(file: str) -> float:
    name = os.fsencode(normalised(file))
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") / 2**32


def _are_labelled(files: list[str], labels_of: LabelsOf) -> bool:
    """Whether most have a label; the others then have none."""
    return 2 * sum(next(iter(labels_of(file)), None) is not None for file in files) > len(files)


def _labels_from_folders(depth: int, label_depth: int) -> tuple[tuple[str, ...], LabelsOf]:
    """The label is the name of ``label_depth`` folders below ``depth``; of more than one, the first is coarse."""

    def labels_of(file: str) -> tuple[str | None, ...]:
        levels = normalised(file).split("/")[depth:-1]
        fine = "/".join(levels[:label_depth]) if len(levels) >= label_depth else None
        return (fine,) if label_depth == 1 else (fine, levels[0] if levels else None)

    return LABEL_SETS[: 1 + (label_depth > 1)], labels_of


def _labels_from_table(table: Mapping[str, str]) -> tuple[tuple[str, ...], LabelsOf]:
    return LABEL_SETS[:1], lambda file: (table.get(file),)


def _labels_from_csv(path: Path, depth: int, files: list[str], notes: list[str]) -> tuple[tuple[str, ...], LabelsOf]:
    """Labels by relative path, or by the path within the part."""
    header, rows = _read_csv(path)
    found = [name.lower() for name in header]
    place = next((found.index(name) for name in PATH_COLUMNS if name in found), None)
    if place is None or len(header) < 2:
        raise ValueError(f"{path}: the first line must name a column path and one label, not {some(header)}.")
    names = [name for i, name in enumerate(header) if i != place]
    table = {
        normalised(row[place]).removeprefix("./"): tuple(
            normalised(value.strip()) or None for i, value in enumerate(row) if i != place
        )
        for row in rows
    }
    kept = _single_labels(path, names, table.values(), notes)
    names = [names[place] for place in kept]
    table = {name: tuple(row[place] for place in kept) for name, row in table.items()}
    nothing = (None,) * len(names)

    def labels_of(file: str) -> tuple[str | None, ...]:
        name = normalised(file)
        return table.get(name, table.get(name.split("/", depth)[-1], nothing))

    hits = sum(not _names(file, depth).isdisjoint(table) for file in files)
    if not hits:
        raise ValueError(f"{path}: none of its {len(table)} paths, such as {next(iter(table), '')!r}, is below --data.")
    if hits < max(len(files), len(table)):
        notes.append(f"{path.name} has {len(table)} rows; {hits} of {len(files)} images have one.")
    return (*LABEL_SETS[: len(names)], *names[len(LABEL_SETS) :]), labels_of


def _single_labels(path: Path, names: list[str], rows: Collection[Sequence[str | None]], notes: list[str]) -> list[int]:
    """The columns with one label in each cell. Scores are accuracies, so a column with several is none, and is told."""
    several = {place for row in rows for place, value in enumerate(row) if value and SEVERAL in value}
    for place in sorted(several):
        notes.append(
            f"{path.name}: the column {names[place]} has several labels in a cell ({SEVERAL} between them) and is not "
            "scored: images are learnt from without them; a column for each label would be."
        )
    return [place for place in range(len(names)) if place not in several]


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a file with commas or tabs.

    Raises:
        ValueError: no such file, or a row of another length.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        lines = list(csv.reader(text.splitlines(), delimiter="\t" if "\t" in text.partition("\n")[0] else ","))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV in UTF-8; correct it: {error}") from error
    header, *rows = lines or [[]]
    for number, row in enumerate(rows, start=2):
        if row and len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} values, the first line has {len(header)}; correct it.")
    return [name.strip() for name in header], [row for row in rows if row]


def _read_subset(path: Path, files: list[str], parts: _Parts, notes: list[str]) -> list[list[str]]:
    """The files that a list names, by path below the folder or within the part; a part without any stays whole."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a list of paths in UTF-8; correct it: {error}") from error
    wanted = {normalised(line.strip()).removeprefix("./") for line in lines} - {""}
    kept = [[file for file in part if _names(file, parts.depth) & wanted] for part in parts.files]
    found = sum(map(len, kept))
    if not found:
        raise ValueError(f"{path}: none of its {len(wanted)} paths is below --data; give paths relative to it.")
    notes.append(f"{path.name} names {len(wanted)} images; {found} are there, of {len(files)}.")
    return [few or whole for few, whole in zip(kept, parts.files, strict=True)]


def _names(file: str, depth: int) -> set[str]:
    name = normalised(file)
    return {name, name.split("/", depth)[-1]}


def _hint(index: FolderIndex) -> str:
    """What was there instead of images."""
    found = f"; there are {some(index.left_out)}" if index.left_out else ""
    return found + ("; pip install 'comad[heic]'" if set(HEIF_ENDINGS) & index.left_out.keys() else "")
