"""Rows come back as they were; what is damaged, half-written or made from something else is unknown."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from comad.distill.teacher_store import TeacherStore, key_name

from comad.distill import teacher_store
from comad.models.backbone import Tokens

ROWS = torch.tensor([3, 0, 5])
INPUTS = (11, 12, 13)
ALL, NONE = [True] * 3, [False] * 3


class Taps(NamedTuple):
    """A nest as teachers with several taps return it."""

    last: Tokens
    blocks: tuple[torch.Tensor, ...]


def values(count: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(count, *shape, generator=generator).to(dtype) for shape in ((7,), (3, 7)))
    return Tokens(*draw)


def open_store(folder, value, storage="computed") -> TeacherStore:
    return TeacherStore(folder / "t", 6, storage, lambda: value).open()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bitwise_in_any_order_and_process(tmp_path, dtype):
    value = values(3, dtype)
    store = open_store(tmp_path, value)
    assert store.known(ROWS, INPUTS).tolist() == NONE and store.num_known() == 0
    store.write(ROWS, INPUTS, value)
    again = open_store(tmp_path, None)  # a later process is not to ask for an example
    for opened in (store, again, again):
        assert opened.known(ROWS.flip(0), INPUTS[::-1]).tolist() == ALL
        cls, patches = opened.read(ROWS.flip(0))
        assert torch.equal(cls, value.cls.flip(0)) and torch.equal(patches, value.patches.flip(0))
        assert cls.dtype == patches.dtype == dtype
    assert again.num_known() == 3 and again.known(torch.tensor([0, 1]), (12, 0)).tolist() == [True, False]


def test_any_nest_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(Taps, "__module__", "comad.test")
    monkeypatch.setattr(teacher_store.importlib, "import_module", lambda name: {
        "comad.test": __import__("types").SimpleNamespace(Taps=Taps),
        "comad.models.backbone": __import__("types").SimpleNamespace(Tokens=Tokens),
    }[name])  # fmt: skip
    value = Taps(Tokens(None, torch.randn(3, 2, 5)), (torch.randn(3, 4), torch.arange(3).view(3, 1)))
    store = open_store(tmp_path, value)
    store.write(ROWS, INPUTS, value)
    found = open_store(tmp_path, None).read(ROWS)
    assert isinstance(found, Taps) and found.last.cls is None
    assert torch.equal(found.last.patches, value.last.patches)
    assert all(torch.equal(x, y) for x, y in zip(found.blocks, value.blocks, strict=True))


def test_a_row_from_another_input_is_unknown(tmp_path):
    value = values(3)
    open_store(tmp_path, value).write(ROWS, INPUTS, value)
    later = open_store(tmp_path, None)
    assert later.known(ROWS, (11, 12, 14)).tolist() == [True, True, False]
    assert later.known(ROWS, INPUTS).tolist() == ALL


def test_a_row_half_written_is_never_believed(tmp_path, monkeypatch):
    value = values(3)
    store = open_store(tmp_path, value)
    monkeypatch.setattr(store, "rows", store.rows)
    written = []

    def dies(file, data, offset, real=teacher_store.os.pwrite):
        written.append(real(file, bytes(data)[: len(data) // 2] if len(written) == 1 else data, offset))
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher_store.os, "pwrite", dies)
        with pytest.raises(KeyboardInterrupt):
            store.write(ROWS, INPUTS, value)
    later = open_store(tmp_path, None)
    assert later.num_known() == 0 and later.known(ROWS, INPUTS).tolist() == NONE


def test_a_damaged_row_is_unknown_and_its_neighbours_are_not(tmp_path):
    value = values(3)
    store = open_store(tmp_path, value)
    store.write(ROWS, INPUTS, value)
    path = tmp_path / "t" / "rows.bin"
    content = bytearray(path.read_bytes())
    content[3 * store.row_bytes + 5] ^= 1  # row 3; a disk that lost power may have the checksum and not the numbers
    path.write_bytes(content)
    later = open_store(tmp_path, None)
    assert later.known(ROWS, INPUTS).tolist() == [False, True, True]


def test_int8_rounds_by_less_than_a_hundredth_and_gives_what_it_will_read(tmp_path):
    value = values(3, torch.float32)
    store = open_store(tmp_path, value, "int8")
    store.write(ROWS, INPUTS, value)
    for now, later, true in zip(store.read(ROWS), open_store(tmp_path, None, "int8").read(ROWS), value, strict=True):
        assert torch.equal(now, later)
        assert float((later - true).abs().max() / true.abs().max()) < 0.5 / 127 + 1e-6
    assert store.row_bytes < 0.7 * open_store(tmp_path / "other", value).row_bytes


def test_a_folder_is_named_after_the_teacher_and_its_key():
    assert key_name("a/b c", {"x": 1}).startswith("a-b-c-")
    assert key_name("a", {"x": 1, "y": (2,)}) == key_name("a", {"y": [2], "x": 1}) != key_name("a", {"x": 2})
