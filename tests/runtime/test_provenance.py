import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import comad
from comad.runtime.log import hours_of_training
from comad.runtime.provenance import code_version, hardware


def test_the_version_has_the_commit_only_in_the_repository(tmp_path):
    assert code_version().startswith(comad.__version__)
    shutil.copytree(Path(comad.__file__).parent / "runtime", tmp_path / "comad" / "runtime")
    shutil.copy(comad.__file__, tmp_path / "comad")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # a repository of something else
    ask = "from comad.runtime.provenance import code_version; print(code_version())"
    told = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert told.stdout.strip() == comad.__version__, told.stderr


def test_hardware_in_words():
    assert hardware(torch.device("cpu"), 1) == "1 CPU thread"
    assert hardware(torch.device("cpu"), 2) == "2 CPU threads"


def test_hours_are_those_of_the_steps(tmp_path):
    lines = [{"step": 1, "images_per_s": 10.0}, {"step": 5, "knn": 3.0}, {"step": 11, "images_per_s": 20.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert hours_of_training(tmp_path, 100) == pytest.approx((1 * 100 / 10 + 10 * 100 / 20) / 3600)
