"""Methods side by side on the bundled pictures: what the default of `comad` rests on, one `comad compare` a question.

`python benchmarks/methods.py masks` answers one, without a name all of them. What is done is not done again, and
students and teacher outputs are shared between the questions. Each table goes to
`benchmarks/results/methods-NAME.json`; the last line printed is all of them as one JSON object.
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
        rows: presets with their options.
        epochs: of every run.
        baselines: rows without distillation.
        options: further ones of `comad compare`.
    """

    title: str
    split: str
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    epochs: int = 8
    baselines: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def both(option: str, value: str) -> str:
    """An option of both terms."""
    return " ".join(f"--objectives.{term}.{option} {value}" for term in ("token", "spatial"))


def warm(temperature: float) -> str:
    """`comad` with this temperature in both terms."""
    return f"comad {both('temperature', f'{temperature:g}')}"


SINGLE = tuple(f"comad --teachers {name}-stamps" for name in ("ibot", "mocov3", "mae"))
FIELD = ("tinymim", "m-tinymim", "tinymim-feat", "dmae", "g2sd", "dmjd", "hybrid", "dmt-like")
FIELD += ("unic", "dune", "radio", "phi-s", "eupe", "gram --teachers ibot-stamps")
MIXED = ("--tuning.mixup", "0.2", "--tuning.cutmix", "0.5")
"""As `small` was when these runs were taken; since then it mixes nothing."""

QUESTIONS = {
    "losses": Question(
        title="Temperature, kind and order of the losses",
        split="val",
        seeds=(0, 1, 2),
        rows=("comad", warm(0.25), f"{warm(0.25)} {both('distance', 'kl-student-teacher')}", "comad-mse"),
    ),
    "losses-once": Question(
        title="Further losses, one seed each",
        split="val",
        seeds=(0,),
        rows=(warm(0.25), warm(0.5), warm(1)),
    ),
    "masks": Question(
        title="What it is worth that the student sees a part",
        split="val",
        seeds=(0, 1, 2),
        rows=("comad", "comad --masking.unmasked-share 0.5", "comad --masking none"),
    ),
    "repairs": Question(
        title="Other masks, aligners and rules",
        split="val",
        seeds=(0, 1, 2),
        rows=(
            "comad",
            "comad --masking independent",
            "comad --masking.hidden token",
            "comad --masking.mask-ratio-end 0.5 --no-cache-teachers",
            "comad --objectives.token.no-cls",
            "comad --fusion.renormalize",
            "comad-anchor",
        ),
    ),
    "gate-of-losses": Question(
        title="A gate of losses, with heads on the student's side",
        split="val",
        seeds=(0, 1, 2),
        rows=("comad", "comad-student-side", "mean"),
    ),
    "softer-gate": Question(
        title="A softer gate",
        split="val",
        seeds=(0, 1, 2),
        rows=("comad", "comad --fusion.temperature 1", "mean"),
    ),
    "default": Question(
        title="The gate against the mean, and three teachers against one",
        split="test",
        seeds=(0, 1, 2, 3, 4),
        rows=("comad", "mean", *SINGLE),
        baselines=("teachers", "untrained", "pixels"),
    ),
    "longer": Question(
        title="The same after four times as many steps",
        split="test",
        seeds=(0, 1, 2, 3, 4),
        rows=("comad", "mean", "comad --teachers ibot-stamps", "comad --teachers mocov3-stamps"),
        epochs=32,
        baselines=("teachers", "untrained", "pixels"),
        options=("--loader.fixed-views", "4"),
    ),
    "field": Question(
        title="The field, every method by the same loop, views and schedule",
        split="test",
        seeds=(0, 1, 2, 3, 4),
        rows=("comad", "comad-literal", "mean", *FIELD),
        baselines=("untrained", "supervised"),
        options=MIXED,
    ),
    "finetuned": Question(
        title="Fine-tuned",
        split="test",
        seeds=(0, 1, 2),
        rows=("comad", "comad-literal", "mean", SINGLE[0], *FIELD),
        baselines=("supervised",),
        options=("--finetune", *MIXED),
    ),
    "convolutional": Question(
        title="Three convolutional teachers in place of the bundled trio",
        split="test",
        seeds=(0, 1, 2),
        rows=(warm(1),),
        epochs=16,
        baselines=("untrained", "pixels"),
        options=("--teachers", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"),
    ),
}


def ask(name: str) -> dict[str, object]:
    """Run one comparison, or go on with it, and keep its table. Questions of the same length share their runs."""
    question = QUESTIONS[name]
    out = RUNS / f"{question.epochs}-epochs"
    command = [sys.executable, "-m", "comad.cli", "compare", "--presets", *question.rows, "--split", question.split]
    command += ["--seeds", *map(str, question.seeds), "--optim.epochs", str(question.epochs), *question.options]
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
