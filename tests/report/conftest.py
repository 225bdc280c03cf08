"""A small run's folder, with every file that a report reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from comad.report.samples import Classes, Neighbours, collect, write_facts

TEACHERS = ("mae", "dino")
NUM_TEST = 60


def log_lines(count=30):
    for step in range(1, count + 1):
        line = {"step": step, "loss": 1 / step, "loss/token": 0.7 / step}
        line |= {"loss/mae/token": 0.4 / step, "loss/dino/token": 0.3 / step}
        line |= {"share_mae": 0.4, "share_dino": 0.6, "lr": 0.001, "images_per_s": 100.0, "data_wait": 2.0}
        line |= {
            "target_information": 0.8,
            "student_cosine": 0.3,
            "student_rank": 20.0,
            "grad_norm": 1.0,
            "epoch": step,
        }
        yield line | ({"knn": 20.0 + step, "held_out_cosine_mae": 0.5 + step / 100} if step % 10 == 0 else {})


def board_row(name, role, knn, **more):
    return {"name": name, "role": role, "params": 1000000, "flops": 10**9, "latency_ms": 2.0, "knn": knn, **more}


def results(name, role, correct):
    text = "".join("1" if hit else "0" for hit in correct)
    groups = [i // 3 for i in range(len(correct))]
    return {"row": {"name": name, "role": role}, "correct": {"knn": text}, "groups": {"knn": groups}}


def write_run(folder: Path, names=TEACHERS, classes=("cat", "dog", "bird"), licence="mit", knn=(80.0, 60.0, 40.0)):
    """Write a run whose student names ``knn[1]`` percent of the test images rightly, its teacher ``knn[0]``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "student").mkdir(exist_ok=True)
    config = {"data": "animals", "teachers": list(names), "method": {"terms": {"token": {}}}, "optim": {"epochs": 2.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    hits = [np.arange(NUM_TEST) % 10 < share / 10 for share in knn]
    people = [
        (names[0], "teacher", 0),
        ("student", "student", 1),
        ("untrained", "untrained", 2),
        ("pixels", "pixels", 2),
    ]
    board = [board_row(name, role, knn[i], linear=50.0) for name, role, i in people]
    (folder / "scoreboard.json").write_text(json.dumps({"rows": board}))
    scores = [results(name, role, hits[i]) for name, role, i in people]
    (folder / "scores.json").write_text(json.dumps({"facts": {"split": "test"}, "scores": scores}))
    cards = [{"name": name, "licence": licence, "source": "file", "params": 5} for name in names]
    card = {"name": "a student", "licence": licence, "hours": 0.5, "hardware": "1 CPU thread", "images_seen": 1234}
    card |= {"data": "animals", "data_licence": licence, "teachers": cards, "code": "0.1", "preset": "comad", "seed": 0}
    (folder / "student" / "config.json").write_text(json.dumps({"comad": card}))
    (folder / "student" / "model.safetensors").write_bytes(b"0" * 1000)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    networks = (*names, "target", "student")
    collect(
        folder,
        pixels,
        masks={name: rng.random((8, 16)) < 0.5 for name in (*names, "student")},
        gate={name: np.full((8, 16), 1 / len(names), np.float32) for name in names},
        features={name: rng.standard_normal((8, 16, 12)) for name in networks},
        neighbours=Neighbours(
            {name: rng.integers(0, 9, (8, 4)) for name in (*names, "student")}, dict(enumerate([*pixels, pixels[0]]))
        ),
        classes=Classes(classes, np.arange(NUM_TEST) % len(classes), list(pixels[:2]), [0, 1]),
    )
    exports = [{"format": "onnx", "file": "student.onnx", "fidelity": "difference 3e-6", "latency": "1 ms"}]
    facts = {"command": "comad distill --data animals", "changed": {"optim.epochs": [2.0, 40.0]}, "exports": exports}
    write_facts(folder, facts | {"data": {"training images": "1,000"}, "cost": {"price": "none"}})
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def comparison(tmp_path):
    """A folder of `comad compare`: a row that is better than the reference, a worse one, one that is neither."""
    folder = tmp_path / "comparison"
    folder.mkdir()

    def row(label, kind, difference, low, high):
        plain = {"label": label, "kind": kind, "teachers": ["mae"], "seeds": [0, 1], "params": 10, "images_seen": 5}
        return plain | {"seconds": 3.0, "knn": 50.0, "knn_minus_reference": difference, "knn_interval": [low, high]}

    rows = [row("comad", "student", 0, 0, 0), row("unic", "student", 2, 1, 3), row("sum", "student", -2, -3, -1)]
    rows += [row("mean", "student", 0.5, -1, 2), row("mae", "teacher", 30, 28, 32)]
    rows += [row("untrained", "untrained", -1, -2, 0.2), row("pixels", "pixels", -9, -10, -8)]
    table = {"reference": "comad", "data": "animals", "split": "val", "rows": rows}
    (folder / "comparison.json").write_text(json.dumps(table))
    return folder
