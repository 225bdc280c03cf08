import os
from dataclasses import fields

import pytest
import torch

from comad.evaluate.scoreboard import Row, Score
from comad.evaluate.scores import read_scores, write_scores


def score(seed=0, n=37):
    generator = torch.Generator().manual_seed(seed)
    correct = {name: torch.rand(n, generator=generator) < 0.5 for name in ("knn", "linear_coarse")}
    groups = {name: torch.randint(9, (n,), generator=generator) for name in correct}
    return Score(Row(name="s", role="student", params=3, flops=4, latency_ms=0.1, knn=12.345678901), correct, groups)


def test_scores_come_back_exactly(tmp_path):
    path = tmp_path / "run" / "scores.json"
    given = (score(), score(1))
    write_scores(path, given, {"seconds": 1.5})
    scores, facts = read_scores(path)
    assert facts == {"seconds": 1.5} and len(scores) == 2
    for a, b in zip(given, scores, strict=True):
        assert a.row == b.row and set(a.correct) == set(b.correct)
        for name in a.correct:
            assert torch.equal(a.correct[name], b.correct[name]) and torch.equal(a.groups[name], b.groups[name])
    assert os.listdir(path.parent) == ["scores.json"]
    assert path.stat().st_size < 1500


@pytest.mark.parametrize("content", ["{", "{}", '{"scores": [{"row": {"other": 1}}], "facts": {}}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=r"s\.json holds no scores of this version; remove it"):
        read_scores(tmp_path / "s.json")


def test_every_score_of_a_row_may_be_missing():
    assert all(field.default is None for field in fields(Row) if field.name.startswith(("knn", "linear", "finetune")))
