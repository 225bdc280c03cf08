"""Rows come back as they were; what is damaged, half-written or made from something else is unknown."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from comad.distillation import cache as cache_module
from comad.distillation.cache import TeacherStore, key_name
from comad.distillation.features import TeacherOutput
from comad.models.backbone import Tokens

ROWS = torch.tensor([3, 0, 5])
INPUTS = (11, 12, 13)
ALL, NONE = [True] * 3, [False] * 3


def values(count: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(count, *shape, generator=generator).to(dtype) for shape in ((7,), (3, 7)))
    return TeacherOutput(*draw)


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
        cls, patches, *_ = opened.read(ROWS.flip(0))
        assert torch.equal(cls, value.cls.flip(0)) and torch.equal(patches, value.patches.flip(0))
        assert cls.dtype == patches.dtype == dtype
    assert again.num_known() == 3 and again.known(torch.tensor([0, 1]), (12, 0)).tolist() == [True, False]


@pytest.mark.parametrize("parts", [(False, False), (True, False), (False, True), (True, True)])
def test_any_output_of_a_teacher_comes_back(tmp_path, parts):
    """With and without class tokens, of the tokens and of queries, keys and values."""
    cls, qkv_cls = (torch.randn(3, 5) if part else None for part in parts)
    qkv = Tokens(qkv_cls, torch.randn(3, 4, 5).bfloat16()) if parts[1] else None
    value = TeacherOutput(cls, torch.randn(3, 2, 5), (), qkv)
    open_store(tmp_path, value).write(ROWS, INPUTS, value)
    found = open_store(tmp_path, None).read(ROWS)
    assert torch.equal(found.patches, value.patches) and (found.cls is None) == (cls is None)
    assert (found.qkv is None) == (qkv is None)
    for ours, theirs in ((found.cls, cls), *zip((found.qkv or ())[:2], (qkv or ())[:2], strict=True)):
        assert theirs is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)


@pytest.mark.parametrize(
    "layout",
    ["", "[", "[1]", "{}", '{"cls": ["float32", [3]]}', '{"patches": ["nonsense", [3]]}', '{"patches": 3}',
     '{"patches": ["float32", [3]], "words": ["float32", [3]]}'],
)  # fmt: skip
def test_a_layout_that_is_damaged_or_of_another_version_is_found_anew(tmp_path, layout):
    value = values(3)
    store = open_store(tmp_path, value)
    store.write(ROWS, INPUTS, value)
    (tmp_path / "t" / "layout.json").write_text(layout)
    again = open_store(tmp_path, value)
    assert again.known(ROWS, INPUTS).tolist() == ALL
    assert set(json.loads((tmp_path / "t" / "layout.json").read_text())) == {"cls", "patches", "checksum"}


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

    def dies(file, data, offset, real=cache_module.os.pwrite):
        written.append(real(file, bytes(data)[: len(data) // 2] if len(written) == 1 else data, offset))
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "pwrite", dies)
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


def test_a_disk_that_is_too_small_is_an_error_when_the_store_is_made(tmp_path, monkeypatch):
    """Room that is taken later, as a memory map is written or read, ends the process by SIGBUS."""
    store = open_store(tmp_path, values(1))
    assert store.num_taken >= store.num_bytes

    def full(file, first, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as error:
        open_store(tmp_path / "other", values(1))
    assert error.value.filename.endswith("rows.bin")


def test_int8_rounds_by_less_than_a_hundredth_and_gives_what_it_will_read(tmp_path):
    value = values(3, torch.float32)
    store = open_store(tmp_path, value, "int8")
    store.write(ROWS, INPUTS, value)
    again = open_store(tmp_path, None, "int8").read(ROWS)
    for now, later, true in zip(store.read(ROWS)[:2], again[:2], value[:2], strict=True):
        assert torch.equal(now, later)
        assert float((later - true).abs().max() / true.abs().max()) < 0.5 / 127 + 1e-6
    assert store.row_bytes < 0.7 * open_store(tmp_path / "other", value).row_bytes


def test_a_folder_is_named_after_the_teacher_and_its_key():
    assert key_name("a/b c", {"x": 1}).startswith("a-b-c-")
    assert key_name("a", {"x": 1, "y": (2,)}) == key_name("a", {"y": [2], "x": 1}) != key_name("a", {"x": 2})
