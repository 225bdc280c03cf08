"""Methods side by side on the bundled pictures: what the default of `comad` rests on, one `comad compare` a question.

`python benchmarks/methods.py repairs` answers one, without a name all of them. What is done is not done again, and
teacher outputs are shared between the questions. Each table goes to `benchmarks/results/methods-NAME.json`; the last
line printed is all of them as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs") / "methods"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One comparison.

    Attributes:
        title: what it asks.
        split: val while choices are made, test for what is reported once.
        seeds: of every row.
        rows: options of `comad compare`.
        epochs: of every run.
        baselines: rows without distillation.
    """

    title: str
    split: str
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    epochs: int = 16
    baselines: tuple[str, ...] = ()


def both(options: str) -> str:
    """`comad` with the same options for its two terms."""
    return "comad " + " ".join(f"--method.terms.{term}.{options}" for term in ("token", "spatial"))


QUESTIONS = {
    "repairs": Question(
        title="Which repair of the printed method",
        split="val",
        seeds=(0,),
        epochs=8,
        rows=(
            "--presets",
            "comad",
            both("temperature 1"),
            both("temperature 0.5"),
            "comad --method.fusion.renormalise",
            "comad-mse",
        ),
    ),
    "default": Question(
        title="The gate against the mean and a uniform gate",
        split="test",
        seeds=(0, 1, 2),
        epochs=8,
        rows=("--presets", "comad", "mean", "comad-uniform"),
    ),
    "single": Question(
        title="All teachers against the best one",
        split="test",
        seeds=(0, 1, 2),
        epochs=8,
        rows=("--presets", "comad", "--teacher-sets", "mae,mocov3,ibot", "ibot"),
    ),
    "convolutional": Question(
        title="Three convolutional teachers in place of the bundled trio",
        split="test",
        seeds=(0, 1, 2),
        rows=(
            "--presets",
            both("temperature 1"),
            "--teachers",
            "efficientnet-lite0",
            "efficientnet-lite1",
            "efficientnet-lite2",
        ),
        baselines=("untrained", "pixels"),
    ),
    "field": Question(
        title="The field, every method by the same loop, views and schedule",
        split="test",
        seeds=(0,),
        epochs=8,
        rows=(
            "--presets",
            "comad",
            "tinymim",
            "tinymim-feat",
            "dmae",
            "g2sd",
            "dmjd",
            "hybrid",
            "dmt-like",
            "unic",
            "dune",
            "radio",
            "phi-s",
            "eupe",
            "gram",
        ),
        baselines=("untrained", "supervised"),
    ),
}


def ask(name: str) -> dict[str, object]:
    """Run one comparison, or go on with it, and keep its table."""
    question, out = QUESTIONS[name], RUNS / name
    command = [sys.executable, "-m", "comad.cli", "compare", *question.rows, "--split", question.split]
    command += ["--seeds", *map(str, question.seeds), "--optim.epochs", str(question.epochs)]
    command += ["--baselines", *question.baselines]
    command += ["--cache-folder", str(RUNS / "teacher-cache"), "--run.out", str(out)]
    subprocess.run(command, check=True)
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(out / "comparison.json", RESULTS / f"methods-{name}.json")
    return json.loads((out / "comparison.json").read_text())


def main() -> None:
    """Answer the questions that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*QUESTIONS, []], help="questions; left out: all of them")
    names = parser.parse_args().names or list(QUESTIONS)
    print(json.dumps({name: ask(name) for name in names}))


if __name__ == "__main__":
    main()
