"""What the README tells people to type is typed, with small teachers in place of large files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from comad.cli import VERBS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"^```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)]
SMALL = ["--student.image-size=16", "--student.patch-size=4", "--student.width=12", "--student.depth=2",
         "--student.heads=2", "--optim.epochs=1", "--optim.batch-size=16", "--loader.workers=0"]  # fmt: skip


def test_the_first_two_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split("#")[0].split() for line in BLOCKS[0]]
    assert [words[0] for words in targets] == ["make", "make"]
    for _, target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_own_images_in_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_specs, labelled_folder):
    install, distil, load = (shlex.split(line) for line in BLOCKS[1])
    assert install == ["pip", "install", "."]
    monkeypatch.chdir(tmp_path)
    first, last = distil.index("--teachers") + 1, distil.index("--run.out")
    assert last - first == len(teacher_specs)
    words = [str(labelled_folder) if word == "FOLDER" else word for word in distil[:first]]
    words += [*teacher_specs, *distil[last:]]
    assert words[0] == "comad"
    assert main([*words[1:], *SMALL]) == 0
    assert load[:2] == ["python", "-c"]
    shown = subprocess.run([sys.executable, "-c", load[2]], capture_output=True, text=True, check=True)
    assert "VisionTransformer" in shown.stdout


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`comad ([a-z]+)", README))))
def test_every_verb_that_is_named_exists(verb: str):
    assert verb in VERBS
