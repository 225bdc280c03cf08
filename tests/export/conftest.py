"""A finished run of a tiny student, and programs run where comad cannot be imported."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from comad.export.card import ModelCard
from comad.export.package import export_backbone
from comad.models.backbone import Backbone
from comad.models.timm_backbone import TimmBackbone, create_vit

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
CARD = ModelCard(
    name="Small student",
    licence="apache-2.0",
    architecture=NAME,
    token_types=("cls", "patch"),
    preset="comad",
    seed=3,
    images_seen=1_000_000,
    data="stamps",
    data_licence="OFL-1.1",
    about="Trained for a test.",
)
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""


class TinyRun(NamedTuple):
    """The folder of a run, its student, and its images."""

    folder: str
    student: Backbone
    data: str


def make_student(seed: int = 0) -> TimmBackbone:
    """Random weights, none left at zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = create_vit(NAME, 16, **{key: value for key, value in ARGS.items() if key != "img_size"})
        backbone = TimmBackbone(vit, (0.5, 0.4, 0.3), (0.485, 0.25, 0.2))
        for parameter in backbone.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone.eval().requires_grad_(False)


@pytest.fixture
def tiny_run(tmp_path, labelled_folder):
    """What a run leaves behind: a student, a recipe that names its images, a scoreboard."""
    folder, student = tmp_path / "run", make_student()
    export_backbone(student, folder / "student", model_args=ARGS, card=replace(CARD, scored_images=14))
    (folder / "config.yaml").write_text(f"data: {labelled_folder}\n")
    (folder / "scoreboard.json").write_text(json.dumps({"rows": [{"name": "student"}]}))
    return TinyRun(str(folder), student, str(labelled_folder))


@pytest.fixture(scope="session")
def run_without():
    """Run a program in a folder, in a process that cannot import some packages. Gives what it prints."""

    def run(code: str, folder, blocked: tuple[str, ...]) -> str:
        text = BLOCKED.format(blocked=blocked) + code
        environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run
