import os

import pytest
import torch

from comad.evaluation.scoreboard import Row, Score
from comad.evaluation.scores import read_scores, write_scores


def score(seed=0, n=37):
    generator = torch.Generator().manual_seed(seed)
    correct = {name: torch.rand(n, generator=generator) < 0.5 for name in ("knn", "linear_coarse")}
    groups = {name: torch.randint(9, (n,), generator=generator) for name in correct}
    return Score(
        Row(name="s", role="student", params=3, flops=4, latency_ms=0.1, scores={"knn": 12.345678901}), correct, groups
    )


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
    assert path.stat().st_size < 1800


OLD = '{"scores": [{"row": {"name": "s", "role": "student", "params": 1, "flops": 1, "latency_ms": 1, "knn": 5.0}, '
OLD += '"correct": {}, "groups": {}}], "facts": {}}'


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"scores": [{"row": {"other": 1}}], "facts": {}}', OLD])
def test_what_is_damaged_or_of_another_version_is_unknown(tmp_path, content, capsys):
    (tmp_path / "s.json").write_text(content)
    assert read_scores(tmp_path / "s.json") is None
    told = capsys.readouterr().err
    assert told.endswith("s.json is damaged or of another version; its scores are computed again.\n")
    assert told.count("\n") == 1


def test_what_was_never_written_is_unknown_in_silence(tmp_path, capsys):
    assert read_scores(tmp_path / "s.json") is None and capsys.readouterr().err == ""


def test_results_between_right_and_wrong_come_back_too(tmp_path):
    given = score()
    given.correct["recall"] = torch.tensor([0.25, 1.0])
    write_scores(tmp_path / "s.json", [given])
    assert read_scores(tmp_path / "s.json").scores[0].correct["recall"].tolist() == [0.25, 1.0]


def test_a_flipped_digit_is_not_believed(tmp_path):
    write_scores(tmp_path / "s.json", [score()])
    text = (tmp_path / "s.json").read_text()
    (tmp_path / "s.json").write_text(text.replace("12.345678901", "92.345678901"))
    assert read_scores(tmp_path / "s.json") is None
