"""Pre-training, fine-tuning, segmentation and comparisons: what is damaged is told and mended, or refused."""

import json
import random
import shutil

import numpy as np
import pytest

from comad.evaluation.scores import read_scores

pytestmark = pytest.mark.slow
VIT = ("image-size=16", "patch-size=4", "width=12", "depth=2", "heads=2")
RUN = ["--optim.epochs=2", "--optim.batch-size=4", "--optim.warmup-epochs=0", "--run.precision=fp32"]
RUN += ["--run.checkpoint-every=2", "--run.log-every=1", "--run.no-tensorboard"]
AUTO = ["--loader.workers=0", "--run.resume=auto"]


def table(out):
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    return {row["label"]: (row["knn"], row["linear"], row["seeds"]) for row in rows}


OUTCOMES = {
    "pretrain": lambda out: (out / "teacher" / "model.safetensors").read_bytes(),
    "finetune": lambda out: read_scores(out / "finetune.json").scores[0].row.scores,
    "segment": lambda out: np.load(out / "counts.npz")["counts"].tolist(),
    "compare": table,
}
DAMAGE = {
    "flipped": lambda content, rng: bytes([content[0] ^ 1 << rng.randrange(8)]) + content[1:],
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "text": lambda content, rng: b"[" * 5000,
    "number": lambda content, rng: b"7",
}


@pytest.fixture(scope="module")
def commands(labelled_folder, dense_folder, teacher_specs):
    """Of each verb what it is started with, but for its folder."""
    data, first = f"--data={labelled_folder}", teacher_specs[0]
    compared = ["--teachers", first, "--presets", "mean", "--seeds", "0", *[f"--student.{option}" for option in VIT]]
    dense = ["--preset=scenes", "--crop=32", "--short-side=32", "--stride=24", "--channels=16", "--run.resume=auto"]
    return {
        "pretrain": ["pretrain", "mae", data, *[f"--vit.{option}" for option in VIT], *RUN, *AUTO],
        "finetune": ["evaluate", "finetune", first, data, "--image-size=16", *RUN, *AUTO],
        "segment": ["evaluate", "segment", first, f"--data={dense_folder}", *dense, *RUN],
        "compare": ["compare", data, *compared, *RUN, *AUTO[:1]],
    }


@pytest.fixture(scope="module")
def ended(commands, start, at_step, tmp_path_factory):
    """Of a verb a run that was killed, and the outcome of a whole one. A comparison, which is many runs, is whole."""
    kept = {}

    def run(verb):
        if verb not in kept:
            out = tmp_path_factory.mktemp(verb)
            status, told = start([*commands[verb], f"--run.out={out / 'whole'}"]).wait()
            assert status == 0, told
            kill = at_step(4, "os.kill(os.getpid(), signal.SIGKILL)") if verb != "compare" else ""
            ended = start([*commands[verb], f"--run.out={out / 'part'}"], before=kill).wait()
            assert ended[0] == (0 if verb == "compare" else -9), ended[1]
            kept[verb] = out / "part", OUTCOMES[verb](out / "whole")
        return kept[verb]

    return run


FILES = {
    "pretrain": ("checkpoints/*4.pt", "log.jsonl", "config.yaml", "data.npy"),
    "finetune": ("checkpoints/*4.pt", "log.jsonl", "config.yaml", "data.npy"),
    "segment": ("checkpoints/*4.pt", "log.jsonl", "config.yaml", "data.npy"),
    "compare": (
        "comparison.yaml", "comparison.json", "**/scores-test.json", "**/scores.json", "**/facts.json",
        "**/config.yaml", "**/log.jsonl", "**/config.json", "**/model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in FILES.items() for name in names])
def test_damaged_state(start, commands, ended, judge, tmp_path, verb, name, damage):
    (part, outcome), out = ended(verb), tmp_path / "run"
    shutil.copytree(part, out)
    paths = sorted(out.glob(name))
    assert paths
    for seed, path in enumerate(paths):
        path.write_bytes(DAMAGE[damage](path.read_bytes(), random.Random(seed)))
    status, told = start([*commands[verb], f"--run.out={out}"]).wait()
    judge(out, status, told, same=lambda: OUTCOMES[verb](out) == outcome)
