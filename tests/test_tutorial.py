"""The notebook and the examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from comad import api
from comad.data.images import ImageSet
from comad.data.load import load_images
from comad.data.loader import evaluation_batches
from comad.distillation import distiller
from comad.distillation.config import DistillConfig

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
SMALL = {
    "STUDENT": {"image_size": 16, "patch_size": 4, "width": 12, "depth": 2, "heads": 2},
    "TRAINING": {"epochs": 1, "batch_size": 16, "warmup_epochs": 0.2, "base_lr": 1e-3, "workers": 0, "log_every": 1},
}


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_cell_of_the_notebook_runs(
    tmp_path: Path, labelled_folder: Path, teacher_specs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    first, *others = cells()
    names: dict[str, Any] = {}
    exec(first, names)
    constants = {"PHOTOS": str(labelled_folder), "OUT": str(tmp_path / "run"), **SMALL}
    assert constants.keys() == names.keys() - {"__builtins__"}
    names |= constants
    source = "\n".join(others)
    assert len(re.findall(r"^TEACHERS = ", source, flags=re.MULTILINE)) == 1
    for cell in others:
        exec(re.sub(r"^TEACHERS = .*$", f"TEACHERS = {list(teacher_specs)}", cell, flags=re.MULTILINE), names)
    said = capsys.readouterr().out
    assert "init_only" in said and "share_first" in said and "validation accuracy" in said
    losses = [float(x) for x in re.findall(r"^step \d: loss ([\d.]+)", said, flags=re.MULTILINE)]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_output_is_left_out_of_the_notebook():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


class OnlyWhatIsWritten(doctest.OutputChecker):
    """An example without an answer may print anything, as a run does."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def examples(thing: Any, **names: Any) -> int:
    """Run the example of a docstring; how many lines it has."""
    (example,) = (t for t in doctest.DocTestFinder(recurse=False).find(thing, globs=names) if t.examples)
    said: list[str] = []
    results = doctest.DocTestRunner(OnlyWhatIsWritten(), verbose=False).run(example, out=said.append)
    assert not results.failed, "".join(said)
    return results.attempted


def test_example_of_the_distiller():
    assert examples(distiller.Distiller) == 9


class Labelled(list[Image.Image]):
    """The first images of a part, as a dataset."""

    def __init__(self, images: ImageSet, count: int):
        super().__init__(images.pil(index) for index in range(count))
        self.targets = images.labels["fine"][:count]


def test_example_of_distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stamps = load_images("stamps")
    image, parts = stamps.val.pil(0), {"train": 400, "val": 40, "test": 40}
    few = load_images({name: Labelled(getattr(stamps, name), count) for name, count in parts.items()})
    monkeypatch.setattr(
        DistillConfig, "load_images", lambda self: few if self.data == "stamps" else pytest.fail(self.data)
    )
    assert examples(api.distill, folder=tmp_path, image=image) == 4


def test_one_image_as_scores_see_it_and_as_it_is(tmp_path: Path, labelled_folder: Path):
    train = load_images(labelled_folder).train
    whole = train.pil(3)
    torch.testing.assert_close(torch.tensor(list(whole.getdata())).T.view(3, 24, 24).byte(), train.load(3))
    assert torch.equal(train.view(3, 16), next(iter(evaluation_batches(train, 16)))[3])
    clear = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    for i in range(8):
        clear.save(tmp_path / f"{i}.png")
    seen = load_images(tmp_path).train
    assert seen.pil(0).size == (40, 30) and seen.pil(0).getpixel((5, 5)) == (255, 255, 255)
    assert torch.equal(seen.view(0, 16), torch.ones(3, 16, 16))
