import json

import numpy as np
import pytest

from comad.reporting import words
from comad.reporting.charts import GROUPS, MAX_POINTS, charts
from comad.reporting.folder import read_comparison, read_run
from comad.runtime.progress import duration

from .conftest import log_lines, write_run


def rewrite_log(run, lines):
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(run)


def levels(sentences):
    return [sentence.level for sentence in sentences]


def test_headline_says_share_and_interval(run):
    text = words.headline(read_run(run))
    assert "1.0M parameters, distilled from mae and dino, names 60.0 % of 60 test images rightly" in text
    assert "75 % (95 % interval " in text and "of its best teacher, mae, with 80.0 %." in text


def test_intervals_of_cases_known_by_hand():
    groups, yes = np.arange(100) // 4, np.ones(100, bool)
    half = np.arange(100) % 2 == 0  # in every concept two of four: no draw differs
    assert words.share_interval(half, yes, groups) == (50, 50, 50)
    assert words.difference_interval(half, yes, groups) == (-50, -50, -50)
    assert words.share_interval(half, ~yes, groups) is None
    clustered = groups % 2 == 0  # whole concepts: 25 coins, a standard error of about 10 points
    share = words.share_interval(clustered, yes, groups)
    assert share is not None and share.value == 52
    assert 28 < share.low < 40 and 64 < share.high < 76


@pytest.mark.parametrize(
    ("knn", "expected", "word"),
    [
        ((80.0, 60.0, 40.0), "good", "is better"),
        ((80.0, 30.0, 50.0), "bad", "is worse"),
        ((80.0, 50.0, 50.0), "warn", "not clearly"),
    ],
)
def test_below_itself_or_pixels_is_said(tmp_path, knn, expected, word):
    sentences = words.verdicts(read_run(write_run(tmp_path, knn=knn)))
    assert levels(sentences) == [expected] * 2
    assert all(word in sentence.text for sentence in sentences)
    assert "its untrained self" in sentences[0].text and "raw pixels" in sentences[1].text


def test_a_worse_student_is_told_without_results_by_image(tmp_path):
    run = write_run(tmp_path, knn=(80.0, 30.0, 50.0))
    (run / "scores.json").unlink()
    assert levels(words.verdicts(read_run(run))) == ["bad", "bad"]
    assert "interval" not in words.headline(read_run(run))


def test_health_of_a_good_run(run):
    assert set(levels(words.health(read_run(run)))) == {"good"}


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        ({"loss": 9.0}, "bad", "did not fall"),
        ({"target_information": 0.1}, "bad", "collapsed"),
        ({"student_cosine": 0.99}, "bad", "same to every image"),
        ({"share_mae": 0.01, "share_dino": 0.99}, "warn", "One teacher"),
        ({"grad_norm": 500.0}, "warn", "jumped"),
        ({"data_wait": 900.0}, "warn", "waiting"),
    ],
)
def test_health_finds(run, change, level, word):
    lines = list(log_lines())
    lines[-1] |= change
    found = [sentence for sentence in words.health(rewrite_log(run, lines)) if sentence.level != "good"]
    assert len(found) == 1 and found[0].level == level and word in found[0].text


def test_numbers_that_are_not_finite_are_told(run):
    lines = [*log_lines(), {"step": 31, "loss": float("nan")}]
    assert any("not finite" in sentence.text for sentence in words.health(rewrite_log(run, lines)))


def test_classes_lost_first(run):
    rows = words.lost_classes(read_run(run))
    assert sorted(row["name"] for row in rows) == ["bird", "cat", "dog"]
    assert all(row["teacher"] >= row["student"] and row["count"] == 20 for row in rows)
    total = sum(row["student"] * row["count"] for row in rows) / 60
    assert total == pytest.approx(60)


def test_comparison_in_words(comparison):
    assert words.compared(read_comparison(comparison)) == [
        ("good", "Better than comad in kNN: unic (+2.0)."),
        ("bad", "Worse than comad in kNN: sum (-2.0)."),
        ("warn", "Not told apart from comad in kNN: mean (+0.5)."),
        ("warn", "comad is not clearly better than a baseline without distillation: untrained (-1.0)."),
        ("good", "comad is better than the baselines without distillation: pixels (-9.0)."),
        ("info", "For comparison, the teachers: mae (+30.0)."),
    ]


def test_a_warning_of_the_log_is_told_once(run):
    lines = list(log_lines())
    lines += [{"step": 30 + i, "warning": f"the targets have collapsed: they keep {i} %"} for i in range(5)]
    found = [sentence.text for sentence in words.health(rewrite_log(run, lines)) if sentence.level == "bad"]
    assert found == ["At step 34: the targets have collapsed: they keep 4 %"]


def test_every_number_of_the_log_stands_in_one_chart(run):
    lines = [line | {"brand_new": 1.0, "token": 0.5, "token_mae": 0.2} for line in log_lines()]
    found = charts(rewrite_log(run, lines))
    shown = {chart["title"]: [part["name"] for part in chart["series"]] for chart in found}
    assert shown["Loss and its terms"] == ["loss", "token", "token"]  # by the names of today and of before
    assert shown["Loss per teacher"] == ["mae/token", "dino/token", "token_mae"]
    assert shown["Share of the target"] == ["mae", "dino"]
    assert shown["Other numbers"] == ["brand_new"]
    keys = {key for line in lines for key in line} - {"step", "epoch"}
    assert sum(map(len, shown.values())) == len(keys) and len(GROUPS) >= len(shown)
    knn = next(chart for chart in found if chart["title"] == "Validation kNN")
    assert knn["steps"] == [10, 20, 30] and knn["series"][0]["values"] == [30, 40, 50]


def test_long_logs_are_thinned_from_first_to_last(run):
    lines = [{"step": step, "loss": float(step)} for step in range(1, 5001)]
    chart = charts(rewrite_log(run, lines))[0]
    assert len(chart["steps"]) == MAX_POINTS and chart["steps"][0] == 1 and chart["steps"][-1] == 5000


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert duration(float(seconds)) == text
