import copy
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
import yaml

from comad import presets
from comad.distillation.config import DistillConfig
from comad.distillation.features import Blocks
from comad.distillation.fusion import Mean
from comad.distillation.masking import Superset, WholeImages
from comad.distillation.objectives import QueueLoss
from comad.models.students import VitConfig
from comad.pretraining.config import METHODS, PretrainConfig
from comad.pretraining.config import recipe as pretrain_recipe
from comad.recipes import read_distillation
from comad.runtime.optim import OptimConfig
from comad.runtime.recipe import flags, read_recipe, write_recipe

CONFIGS = {
    **{f"{name} demo={demo}": presets.recipe(name, demo) for name in presets.METHODS for demo in (True, False)},
    **{name: pretrain_recipe(name) for name in METHODS},
    "changed": replace(
        presets.recipe("comad", True),
        teachers=("a=b/c", "d"),
        student=VitConfig(patch_size=None, drop_path=0.1),
        optim=OptimConfig(betas=(0.5, 0.6), base_lr=1e-5, epochs=0.5),
        data="~/Bilder/Ä ö",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(tmp_path, name):
    config = CONFIGS[name]
    write_recipe(config, tmp_path / "config.yaml")
    found = read_recipe(type(config), tmp_path / "config.yaml")
    assert found == config
    write_recipe(found, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()


def test_a_recipe_may_set_a_part(tmp_path):
    (tmp_path / "r.yaml").write_text("optim:\n  epochs: 3\nmethod:\n  masking: {mask_ratio: 0.9}\n  fusion: mean\n")
    config = read_recipe(DistillConfig, tmp_path / "r.yaml")
    assert config.optim == OptimConfig(epochs=3.0)
    assert config.method.masking.mask_ratio == 0.9 and config.method.fusion == Mean()
    assert config.method.aligner == DistillConfig().method.aligner


def leaves(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def misspelt(tree, path):
    """The tree with the last key of a path spelt with one letter too many, its value kept."""
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1] + "x"] = node.pop(path[-1])
    return tree


@pytest.mark.parametrize("name", ["comad demo=True", "comad-literal demo=True", "mean demo=True", *METHODS])
def test_an_unknown_key_is_refused_at_any_depth_with_the_nearest_one(tmp_path, name):
    config, path = CONFIGS[name], tmp_path / "config.yaml"
    write_recipe(config, path)
    tree = yaml.safe_load(path.read_text())
    paths = [keys for keys in leaves(tree) if keys[:-1] != ("method", "objectives")]
    assert max(map(len, paths)) >= 2
    for keys in paths:
        path.write_text(yaml.safe_dump(misspelt(tree, keys)))
        with pytest.raises(ValueError, match=rf"unknown key '{keys[-1]}x'; did you mean '{keys[-1]}'\?") as error:
            read_recipe(type(config), path)
        assert "\n" not in str(error.value) and all(key in str(error.value) for key in keys[:-1])


def test_an_unknown_key_far_from_all_gets_the_list(tmp_path):
    (tmp_path / "r.yaml").write_text("optim: {qqq: 1}")
    with pytest.raises(ValueError, match=r"optim: unknown key 'qqq'; there are: epochs, batch_size"):
        read_recipe(DistillConfig, tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("optim: {epochs: many}", "optim.epochs"),
        ("optim: {batch_size: 1.5}", "optim.batch_size"),
        ("optim: {betas: [0.9]}", "optim.betas"),
        ("optim: 3", "optim"),
        ("student: {width: wide}", "student.width"),
        ("teachers: {a: b}", "teachers"),
        ("run: {resume: perhaps}", "run.resume"),
        ("method: {masking: {name: random}}", "method.masking: "),
        ("method: {masking: random}", "no masking 'random'"),
        ("method: {fusion: men}", "did you mean 'mean'?"),
        ("method: {fusion: [mean]}", "method.fusion"),
        ("method: {fusion: 3}", "method.fusion"),
        ("method: {masking: {mask_ratio: 1.5}}", "method.masking"),
        ("method: {masking: {mask_ratio: half}}", "mask_ratio"),
        ("method: {objectives: {token: {distance: euclid}}}", "no distance 'euclid'"),
        ("method: {objectives: {token: {name: feature, distanc: mse}}}", "did you mean 'distance'?"),
        ("- a\n- b", ""),
        ("", ""),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_says_where(tmp_path, text, where):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_recipe(DistillConfig, tmp_path / "r.yaml")
    assert str(tmp_path / "r.yaml") in str(error.value) and where in str(error.value)
    assert "\n" not in str(error.value)


OLD = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
"""Recipes as the first version wrote them into the folder of a run."""


CHANGED = {"comad-literal", "dmae", "g2sd", "gram", "hybrid", "unic"}
"""Presets whose numbers are others today; a recipe keeps its own."""


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_a_recipe_of_the_first_version_is_what_it_was(path, capsys, tmp_path):
    config, today = read_distillation(path), presets.recipe(path.stem, demo=True)
    assert "names of the first version" in capsys.readouterr().err
    assert (config.method == today.method) == (path.stem not in CHANGED)
    assert config.run.precision == "bf16"  # as recorded, whatever is quick here
    assert replace(config, method=today.method) == replace(today, run=replace(today.run, precision="bf16"))
    write_recipe(config, tmp_path / "again.yaml")
    assert read_distillation(tmp_path / "again.yaml") == config


def test_recipes_of_the_first_version_are_there():
    assert len(OLD) == 7


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("masking: {student: 0.9}", {"masking": Superset(mask_ratio=0.9)}),
        ("masking: {policy: none, student: 0.9}", {"masking": WholeImages()}),
        ("decoder_depth: 2", {"masking": Superset(decoder_depth=2)}),
        ("fusion: {kind: mean}", {"fusion": Mean()}),
        ("tap: {qkv: 0.5}\n  fusion: mean", {"features": Blocks(qkv=0.5), "fusion": Mean()}),
        ("queue: 7\n  terms: {q: {over: queue, weight: 2}}", {"objectives": {"q": QueueLoss(size=7, weight=2.0)}}),
    ],
)
def test_a_part_of_a_recipe_of_the_first_version_leaves_the_rest_as_it_is(tmp_path, text, changed):
    (tmp_path / "r.yaml").write_text(f"method:\n  {text}\n")
    assert read_distillation(tmp_path / "r.yaml").method == replace(presets.COMAD, **changed)


def test_students_of_a_recipe_of_the_first_version(tmp_path):
    (tmp_path / "r.yaml").write_text("beside: [{width: 96}]\n")
    assert read_distillation(tmp_path / "r.yaml").extra_students == (VitConfig(width=96),)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("masking: {policy: superset, studnt: 0.8}", "unknown key 'studnt'"),
        ("fusion: {kind: gate, temprature: 1}", "unknown key 'temprature'; did you mean 'temperature'"),
        ("fusion: {kind: gat}", "no fusion 'gat'; did you mean 'gate'"),
        ("terms: {token: {over: channles}}", "no objective 'channles'"),
        ("terms: 3", "method.objectives"),
        ("terms: {token: 3}", "method.objectives"),
    ],
)
def test_a_mistake_in_a_recipe_of_the_first_version_is_told(tmp_path, part, words):
    (tmp_path / "r.yaml").write_text(f"method:\n  tap: {{teacher: 1.0}}\n  {part}\n")
    with pytest.raises(ValueError, match=words):
        read_distillation(tmp_path / "r.yaml")


def test_a_missing_recipe_says_where_to_find_one(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe .*config\.yaml"):
        read_recipe(DistillConfig, tmp_path / "none.yaml")


def test_flags_are_those_that_give_the_config_again():
    default = pretrain_recipe("mae")
    vit, loader = replace(default.vit, width=96), replace(default.loader, fixed_views=3)
    run = replace(default.run, seed=7, tensorboard=False, out="elsewhere")
    config = replace(default, init="a.pth", vit=vit, loader=loader, run=run)
    text = flags(config, default)
    assert "elsewhere" not in text
    again = tyro.cli(tyro.conf.AvoidSubcommands[PretrainConfig], default=default, args=text.split())
    assert again == replace(config, run=replace(run, out=default.run.out))
    assert flags(default, default) == ""
