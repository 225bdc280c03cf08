import pickle
import random

import numpy as np
import pytest
import torch

from comad.runtime import atomic
from comad.runtime import checkpoint as checkpoint_module
from comad.runtime.atomic import remove_leftovers
from comad.runtime.checkpoint import (
    checkpoints,
    differences,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 20, 300, 4000):
        path = save_checkpoint(tmp_path / "c", step, {"step": step}, keep=2)
        assert path == checkpoints(tmp_path / "c")[-1]
        assert load_checkpoint(path) == {"step": step}
    assert names(tmp_path / "c") == ["step-00000300.pt", "step-00004000.pt"]


@pytest.mark.parametrize("written", [b"", b"half of a checkpoint"])
def test_a_failure_while_writing_leaves_no_partial_file(tmp_path, monkeypatch, written):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)

    def fail(state, file):
        file.write(written)
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert names(tmp_path) == ["step-00000001.pt"]
    assert load_checkpoint(checkpoints(tmp_path)[-1]) == {"step": 1}


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_away(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "_remove", lambda place: None)  # the process is dead by then
        patch.setattr(checkpoint_module.torch, "save", lambda state, file: (_ for _ in ()).throw(KeyboardInterrupt))
        save_checkpoint(tmp_path, 1, {}, keep=1)
    assert checkpoints(tmp_path) == [] and names(tmp_path) != []
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
    save_checkpoint(tmp_path, 2, {}, keep=1)
    assert names(tmp_path) == ["step-00000002.pt"]


def test_all_random_states_survive_a_round_trip(tmp_path):
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)
    random.gauss(0, 1)  # leaves a half-used pair behind
    np.random.standard_normal()

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    path = save_checkpoint(tmp_path, 1, {"random": random_states()}, keep=1)
    for draw in (torch.rand, np.random.standard_normal):
        draw(3)
    random.gauss(0, 1)
    restore_random_states(load_checkpoint(path)["random"])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    for part, expected in zip(np.random.get_state(), before[2], strict=True):
        assert np.array_equal(part, expected)


def test_a_checkpoint_holds_no_pickled_objects(tmp_path):
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    state = {"optimizer": optimizer.state_dict(), "random": random_states(), "step": 3}
    path = save_checkpoint(tmp_path, 1, state, keep=1)
    assert torch.load(path, weights_only=True)["step"] == 3
    torch.save({"bad": pickle.Pickler}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_file_is_told_in_one_line(tmp_path, damage):
    path = save_checkpoint(tmp_path, 7, {"weights": torch.rand(100)}, keep=1)
    content = {"empty": b"", "cut": path.read_bytes()[:400], "text": b"hello"}[damage]
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"step-00000007\.pt is not a readable checkpoint; remove it to resume"
    ) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_differences_name_the_leaves():
    stored = {"a": {"b": 1, "c": [1, 2]}, "teachers": {"x": {"sha256": "1"}}}
    current = {"a": {"b": 2, "c": [1, 2]}, "teachers": {"x": {"sha256": "2"}, "y": 3}}
    assert differences(stored, current) == ["a.b: 1 → 2", "teachers.x.sha256: 1 → 2", "teachers.y: None → 3"]
    assert differences(stored, stored) == []
    assert differences({"cards": {"a": {"sha256": 1}}}, {"cards": {"b": {"sha256": 2}}}) == [
        "cards.a: gone",
        "cards.b: new",
    ]
