"""What kNN and the linear probe cost at scale, from a smaller run on random features: `python benchmarks/probes.py`.

Measured on one core are a step of the linear probe, with all classes and settings, and the comparison of a query with
a row of the bank. They are multiplied up to the numbers of images and networks. Prints one JSON object and writes it to
`benchmarks/results`. `--source FOLDER/src` takes another version of the package.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WIDTH, POOLS = 768, 2


def seconds_of(work: Callable[[], object], repeats: int = 2) -> float:
    """Of the processor, on which others may run: the shortest of a few times."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def line(work: Callable[[int], object], few: int, more: int) -> float:
    """Seconds of one more."""
    return (seconds_of(lambda: work(more)) - seconds_of(lambda: work(few))) / (more - few)


def everything(images: int, *evaluations: Any) -> None:
    """Score one pool of so many training images, half of a hundredth of them to choose and to test on."""
    import torch

    from comad.evaluation.features import Features, FeatureSplits

    def draw(count: int) -> Features:
        labels = {"fine": torch.arange(count) % 100}
        return Features({"patch": torch.randn(count, WIDTH)}, labels, torch.arange(count))

    features = FeatureSplits(draw(images), draw(images // 200), draw(images // 200))
    for evaluation in evaluations:
        evaluation(features)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the parts and of the whole, and the peak of memory with all images but few classes and steps."""
    import torch

    from comad.evaluation import knn, linear

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.sample, WIDTH, generator=generator)
    y = torch.arange(options.sample) % options.classes
    old = hasattr(knn, "NearestNeighbours")  # the version that this one is compared with
    probe, batch = linear.LinearProbe(), 1024

    def steps(count: int, settings: int = 9, **changes: Any) -> object:
        rows = slice(0, count * batch)
        if old:
            return linear.LinearProbe(epochs=1).fit(x[rows], y[rows], options.classes)
        return probe.fit(x[rows], y[rows], probe.settings[:settings], count, **changes)

    half = not old and linear.has_bf16(torch.device("cpu"))
    neighbours = (knn.NearestNeighbours if old else knn.KNN)()
    most = 8
    step = line(steps, 1, most)
    pair = line(lambda count: neighbours.classify(x, y, x[:count]), 512, 2048) / options.sample
    passes = math.ceil(options.images / batch) * 60
    if old:
        total_steps = POOLS * passes * step
        facts: dict[str, Any] = {"steps": POOLS * passes, "step": step}
    else:
        few = line(lambda count: steps(count, probe.kept, half=half), 1, most)
        full, trial = probe.num_steps(options.images), probe.trial_steps
        step = line(lambda count: steps(count, half=half), 1, most) if half else step
        total_steps = POOLS * trial * step + full * few
        facts = {"trial_steps": POOLS * trial, "step": step, "full_steps": full, "step_of_kept": few}
        facts["bf16"] = half
    compared = (POOLS + 1) * options.held_out if old else POOLS * neighbours.chosen_on + options.held_out
    knn_seconds = compared * options.images * pair
    seconds = {"linear": options.networks * total_steps, "knn": options.networks * knn_seconds}
    del x
    everything(options.images, neighbours, linear.LinearProbe(epochs=1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds_per_core": {name: round(value) for name, value in seconds.items()},
        "hours_per_core": round(sum(seconds.values()) / 3600, 2),
        "peak_gib": round(peak, 2),
        "features_gib": round(4 * options.images * WIDTH / 2**30, 2),
        **facts,
        "knn_ns_per_pair": round(1e9 * pair, 1),
    }


def main() -> None:
    """Measure, or be measured as another version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000, help="training images to project to")
    parser.add_argument("--held-out", type=int, default=20_000, help="images of val and of test, each")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--networks", type=int, default=6)
    parser.add_argument("--sample", type=int, default=65_536, help="random training images that are measured")
    parser.add_argument("--source", help="folder of the package's source, for another version")
    parser.add_argument("--name", default="probes")
    options = parser.parse_args()
    if options.source:
        sys.path.insert(0, options.source)
    report = {"width": WIDTH, "pools": POOLS, **vars(options), **measure(options)}
    del report["source"], report["name"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
