"""The options of images that all commands share."""

import pytest

from comad.comparison.config import CompareConfig
from comad.data.load import DataConfig, load_images
from comad.distillation.config import DistillConfig
from comad.evaluation.command import EvaluateConfig, evaluate
from comad.evaluation.comparison import CompareConfig as TeachersConfig
from comad.evaluation.embed import EmbedConfig
from comad.evaluation.inspection import InspectConfig
from comad.evaluation.tuning import FinetuneConfig
from comad.planning.command import DistillPlan
from comad.pretraining.config import PretrainConfig
from comad.runtime.command import parse
from comad.runtime.options import identity_of
from comad.runtime.recipe import read_recipe, write_recipe

KINDS = [DistillConfig, PretrainConfig, FinetuneConfig, EvaluateConfig, EmbedConfig, InspectConfig, TeachersConfig]
GROUPED = [CompareConfig, DistillPlan]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path, write_images):
    root = write_images(tmp_path / "set", [f"{a}/{b}/{i}.png" for a in ("cat", "dog") for b in "xy" for i in range(30)])
    (tmp_path / "few.txt").write_text("\n".join(f"cat/{b}/{i}.png" for b in "xy" for i in range(30)))
    return root


@pytest.mark.parametrize("kind", KINDS + GROUPED)
def test_every_command_takes_them(kind, folder, tmp_path):
    given = ["--data", str(folder), "--label-depth", "2", "--subset", str(tmp_path / "few.txt")]
    if kind in (FinetuneConfig, EvaluateConfig):
        given += ["--backbone", "mae-stamps"]
    config = parse(kind, None, given, "comad")
    config = config.recipe if kind in GROUPED else config
    splits = config.load_images()
    assert splits.class_names == {"fine": ("cat/x", "cat/y"), "coarse": ("cat",)}
    assert sum(len(part) for part in splits[:3]) == 60
    assert config.data_options == {
        "data": str(folder),
        "label_depth": 2,
        "labels": "",
        "subset": str(tmp_path / "few.txt"),
    }


def test_they_are_in_the_recipe_and_their_paths_do_not_change_a_result(folder, tmp_path):
    config = DistillConfig(data=str(folder), label_depth=2)
    write_recipe(config, tmp_path / "config.yaml")
    assert read_recipe(DistillConfig, tmp_path / "config.yaml") == config
    assert identity_of(config) == identity_of(DistillConfig())
    one, two = (DataConfig(data=str(folder), label_depth=depth).load_images().train for depth in (1, 2))
    assert one.fingerprint() != two.fingerprint()  # which is what a resume compares


def test_several_labels_in_a_cell_are_told_and_not_scored(folder, tmp_path):
    rows = [f"{a}/{b}/{i}.png,{a}|{b},{b}" for a in ("cat", "dog") for b in "xy" for i in range(30)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,tags,kind", *rows]))
    splits = load_images(str(folder), labels=table)
    assert splits.class_names == {"fine": ("x", "y")}
    assert "labels.csv: the column tags has several labels in a cell" in splits.summary().text
    table.write_text("\n".join(["path,tags", *(row.rpartition(",")[0] for row in rows)]))
    splits = load_images(str(folder), labels=table)
    assert splits.class_names == {} and len(splits.train) > 60
    with pytest.raises(ValueError, match="0 train images have a fine label"):
        evaluate("mae-stamps", splits)
