from dataclasses import replace

import pytest
import torch

from comad.compare.config import CompareConfig
from comad.compare.entries import list_entries
from comad.compare.table import markdown, tabulate
from comad.evaluate.evaluation import PerImage
from comad.evaluate.intervals import paired_interval
from comad.evaluate.scoreboard import Row, Score
from comad.evaluate.scores import Scores
from comad.presets import recipe

FACTS = {"images_seen": 10, "seconds": 1.0, "code": "x"}


def measured(hits, **others):
    """Scores of one seed: kNN and whatever else is given."""
    groups = torch.arange(len(hits)) // 2
    row = Row(name="x", role="student", params=1, flops=1, latency_ms=1.0)
    found = {name: PerImage(part, groups) for name, part in {"knn": hits, **others}.items()}
    return Scores((Score(row, {}, {}).joined(found),), FACTS)


def table(*results):
    config = replace(recipe("comad", demo=True), teachers=("a=a.pth", "b=b.pth"))
    compare = CompareConfig(presets=("comad", "mean"), recipe=config, baselines=())
    entries, reference = list_entries(compare)
    return tabulate(compare, entries, results, reference)


def draw(seed, share):
    return torch.rand(1200, generator=torch.Generator().manual_seed(seed)) < share


def test_a_score_tells_how_many_images_concepts_and_seeds_it_is_of():
    ours, other = {s: draw(s, 0.6) for s in (0, 1, 2)}, {s: draw(9 + s, 0.5) for s in (1, 2)}
    found = table(*({seed: measured(hits) for seed, hits in part.items()} for part in (ours, other)))
    row = found["rows"][1]
    assert (row["knn_images"], row["knn_concepts"], row["knn_seeds"]) == (1200, 600, 2)
    a, b = (torch.stack([part[seed] for seed in (1, 2)]) for part in (other, ours))
    expected = paired_interval(a, b, torch.arange(1200) // 2)
    assert [row["knn_minus_reference"], *row["knn_interval"]] == [round(value, 4) for value in expected[:3]]
    assert row["knn_over"] == "seeds and concepts"
    page = markdown(found)
    assert "kNN (1,200 images of 600 concepts)" in page and "]*)" not in page


def test_one_seed_is_marked_and_an_unknown_score_has_a_column():
    hits = draw(0, 0.5)
    found = table({0: measured(hits, luck=hits.double() / 2)}, {0: measured(~hits)})
    page = markdown(found)
    assert found["scores"]["luck"] == "luck" and "luck (1,200 images of 600 concepts)" in page
    assert found["rows"][1]["luck"] is None and found["rows"][0]["luck"] == pytest.approx(
        found["rows"][0]["knn"] / 2, abs=1e-3
    )
    assert found["rows"][1]["knn_over"].startswith("concepts alone") and page.count("]*)") == 3
    assert "Coarse" not in page
