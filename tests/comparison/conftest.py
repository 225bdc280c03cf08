"""A comparison of the smallest kind: tiny pictures, two random teachers, a student of two blocks, seconds."""

from __future__ import annotations

import pytest

STUDENT = {"image-size": 16, "patch-size": 4, "width": 12, "depth": 2, "heads": 2}
RUN = {"precision": "fp32", "log-every": 1, "checkpoint-every": 3}


@pytest.fixture(scope="session")
def compare_command(labelled_folder, teacher_specs):
    """The command line of a comparison with 5 training steps a run."""

    def build(out, *more):
        student = [f"--student.{key}={value}" for key, value in STUDENT.items()]
        run = [*(f"--run.{key}={value}" for key, value in RUN.items()), "--run.no-tensorboard", f"--run.out={out}"]
        optim = ["--optim.epochs=1", "--optim.batch-size=10", "--optim.warmup-epochs=0.5", "--loader.workers=0"]
        data = [f"--data={labelled_folder}", "--teachers", *teacher_specs]
        return ["compare", *data, *student, *run, *optim, *map(str, more)]

    return build
