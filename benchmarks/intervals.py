"""Coverage and power of `paired_interval`, beside a plain t over paired seed means, on simulated answers.

A difference has a part of its seed (0, 1 or 2 points), a part of its concept, and chance. A quarter of the images is of
a tenth of the concepts, as classes are uneven. Prints one JSON object and writes it to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from comad.evaluation.intervals import paired_interval

RESULTS = Path(__file__).parent / "results"
TRUTH = 1.4
"""Points that the better row is ahead by."""


def answers(generator: np.random.Generator, groups: np.ndarray, seeds: int, seed_sd: float, concept_sd: float):
    """Two rows of answers, bool (seeds, images): images are hard or easy for both, the first is ahead by `TRUTH`."""
    concepts = groups.max() + 1
    hard = generator.normal(0, 0.15, concepts)[groups] + generator.normal(0, 0.1, len(groups))
    base = np.clip(0.5 + hard, 0.2, 0.8)
    seed = generator.normal(0, seed_sd / 100, (seeds, 1))
    concept = generator.normal(0, concept_sd / 100, concepts)[groups]
    ahead = np.clip(base + TRUTH / 100 + seed + concept, 0, 1)
    return (generator.random((seeds, len(groups))) < p for p in (ahead, np.broadcast_to(base, ahead.shape)))


def over_seeds(differences: Sequence[float]) -> dict[str, float]:
    """Mean of paired differences, one a seed, and its 95 % t interval; the test images are taken as they are."""
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    mean = float(np.mean(differences))
    return {"difference": mean, "low": mean - float(half), "high": mean + float(half)}


def simulate(draws: int, images: int, seeds: int, concepts: int, seed_sd: float, concept_sd: float) -> dict[str, float]:
    """Percent of draws whose interval holds the truth, and of those that leave out 0, of both methods."""
    generator = np.random.default_rng(0)
    big = max(1, concepts // 10)
    weights = np.where(np.arange(concepts) < big, 0.25 / big, 0.75 / (concepts - big))
    groups = np.concatenate([np.arange(concepts), generator.choice(concepts, images - concepts, p=weights)])
    found = np.zeros((draws, 4))
    for row in found:
        a, b = answers(generator, groups, seeds, seed_sd, concept_sd)
        ours = paired_interval(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(groups))
        plain = over_seeds(100 * (a.mean(axis=1) - b.mean(axis=1)))
        for column, (low, high) in enumerate(((ours.low, ours.high), (plain["low"], plain["high"]))):
            row[2 * column], row[2 * column + 1] = low <= TRUTH <= high, low > 0 or high < 0
    names = ("coverage", "power", "plain_t_coverage", "plain_t_power")
    facts = {"seeds": seeds, "concepts": concepts, "seed_points": seed_sd, "concept_points": concept_sd}
    return facts | {name: round(100 * float(value), 1) for name, value in zip(names, found.mean(axis=0), strict=True)}


def main() -> None:
    """Every number of seeds and concepts with every size of effects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    start = time.perf_counter()
    cases = itertools.product((2, 3, 5), (37, 101), (0, 1, 2), (0, 3, 6))
    rows = [simulate(options.draws, options.images, *case) for case in cases]
    report = {"truth": TRUTH, **vars(options), "seconds": round(time.perf_counter() - start, 1), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "intervals.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
