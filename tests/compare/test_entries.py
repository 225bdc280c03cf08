from dataclasses import replace
from pathlib import Path

import pytest

from comad.compare.ablations import ABLATIONS, OURS
from comad.compare.config import CompareConfig
from comad.compare.entries import list_entries
from comad.distill.aligners import ProcrustesAligner
from comad.distill.fusion import Gate
from comad.distill.masking import Superset
from comad.distill.objectives import RelationLoss
from comad.presets import METHODS, recipe

RECIPE = replace(recipe("comad", demo=True), teachers=("mae=a.pth", "mocov3=b.pth", "ibot=c.pth"))


def entries(*presets, **more):
    more.setdefault("baselines", ())
    return list_entries(CompareConfig(presets=presets, recipe=more.pop("recipe", RECIPE), **more))


def labels(found):
    return [entry.label for entry in found[0]]


def test_rows_are_presets_by_teacher_sets():
    found, reference = entries("mean", "comad", teacher_sets=("mae,moco", "ibot"))
    assert [entry.label for entry in found] == [
        "mean (mae + mocov3)", "mean (ibot)", "comad (mae + mocov3)", "comad (ibot)"]  # fmt: skip
    assert [entry.teachers for entry in found[:2]] == [("mae=a.pth", "mocov3=b.pth"), ("ibot=c.pth",)]
    assert found[0].teacher_names == ("mae", "mocov3")
    assert reference is found[2]  # comad, with most teachers
    assert [entry.config.method for entry in found] == [METHODS["mean"]] * 2 + [METHODS["comad"]] * 2


def test_only_a_row_whose_pictures_repeat_is_cached():
    found, _ = entries("gram", "comad", "mean --no-cache-teachers", recipe=replace(RECIPE, cache_teachers=True))
    assert [entry.config.cache_teachers for entry in found] == [False, True, False]


def test_a_row_has_one_student():
    with pytest.raises(ValueError, match="a row has one student; leave `extra_students` out"):
        entries("comad", recipe=replace(RECIPE, extra_students=(RECIPE.student,)))


def test_one_teacher_set_is_not_named():
    assert labels(entries("comad", "mean")) == ["comad", "mean"]


def test_a_row_may_change_options_of_its_preset():
    text = "mean --masking.mask-ratio 0.8 --masking.teacher-mask-ratios 0.1 0.2 --optim.epochs 3"
    (first, second), reference = entries(text, "comad")
    assert first.label == first.preset == first.config.preset == text and reference is second
    assert first.config.method.masking == Superset(mask_ratio=0.8, teacher_mask_ratios=(0.1, 0.2))
    assert first.config.method.fusion == METHODS["mean"].fusion and first.config.optim.epochs == 3


def test_a_row_may_choose_members_of_slots():
    text = "unic --fusion gate --fusion.temperature 2 --aligner procrustes --objectives.gram relation"
    (entry,), _ = entries(text)
    method = entry.config.method
    assert method.fusion == Gate(temperature=2.0) and method.aligner == ProcrustesAligner()
    assert method.normalizer == METHODS["unic"].normalizer and method.objectives["gram"] == RelationLoss()
    with pytest.raises(ValueError, match="no fusion 'gat'; did you mean 'gate'"):
        entries("unic --fusion gat")


def test_a_row_may_choose_a_member_from_a_plugin():
    file = Path(__file__).parents[2] / "docs" / "adding" / "learned_router.py"
    (entry, _), reference = entries(f"comad --plugin {file} --fusion router --fusion.temperature 2", "comad")
    assert entry.config.method.fusion.name == "router" and entry.config.method.fusion.temperature == 2.0
    assert reference.label == "comad" and reference.config.method == METHODS["comad"]


def test_the_reference_is_named_by_preset_or_row_and_is_comad_else_the_first():
    assert entries("mean", "comad")[1].label == "comad"
    assert entries("mean", "comad-mse")[1].label == "mean"
    assert entries("mean", "comad", reference="mean")[1].label == "mean"
    assert entries("mean", baselines=("teachers",), reference="ibot")[1].kind == "teacher"


def test_baselines_follow():
    found, _ = entries("comad", baselines=("teachers", "untrained", "init-only", "supervised", "pixels"))
    assert [entry.label for entry in found][1:] == [
        "mae", "mocov3", "ibot", "untrained", "init-only", "supervised", "pixels"]  # fmt: skip
    found, _ = entries("comad", teacher_sets=("mae", "mae,ibot"), baselines=("teachers",))
    assert [entry.label for entry in found][2:] == ["mae", "ibot"]


def test_the_init_only_row_has_the_weights_that_the_student_starts_from():
    pretrained = replace(RECIPE, student=replace(RECIPE.student, pretrained=True))
    found, _ = entries("comad", recipe=pretrained, baselines=("untrained", "init-only"))
    assert [entry.config.student.pretrained for entry in found] == [True, False, True]


def test_ablations_are_the_papers_tables():
    found, reference = entries(ablation="gate")
    assert [(entry.label, entry.preset) for entry in found] == list(ABLATIONS["gate"].items())
    assert reference.label == "Combined (ours)" and reference.config.method == METHODS["comad"]

    found, reference = entries(ablation="masks")
    ratios = [
        (entry.config.method.masking.mask_ratio, *entry.config.method.masking.teacher_mask_ratios) for entry in found
    ]
    assert ratios == [(0.8, 0.45, 0.35, 0.25), (0.75, 0.5, 0.4, 0.3), (0.7, 0.55, 0.45, 0.35)]
    assert reference.config.method == METHODS["comad"] and reference.label.startswith("0.75")

    found, reference = entries(ablation="losses")
    assert reference.label == "Dual w/ KL (ours)" and reference.preset == "comad"
    assert [entry.preset for entry in found][-5:] == [
        "comad-token-only",
        "comad-spatial-only",
        "mean",
        "comad-mse",
        "comad",
    ]

    found, reference = entries(ablation="teachers")
    assert [entry.teacher_names for entry in found] == [
        ("mae",), ("mocov3",), ("ibot",), ("mae", "mocov3"), ("mae", "ibot"), ("mocov3", "ibot"),
        ("mae", "mocov3", "ibot")]  # fmt: skip
    assert reference is found[-1] and found[3].label == "mae + mocov3"
    assert labels(entries("mean", ablation="gate"))[-1] == "mean"
    assert OURS.keys() <= ABLATIONS.keys()


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_row_of_an_ablation_exists(ablation):
    assert all(entry.config.method for entry in entries(ablation=ablation)[0])


@pytest.mark.parametrize(
    ("presets", "more", "words"),
    [
        ((), {}, r"nothing to compare; name methods, as in --presets comad mean, or --ablation gate\|masks"),
        (("comad", "maen"), {}, "no preset 'maen'; did you mean 'mean'"),
        (("",), {}, "no preset ''"),
        ((), {"ablation": "gates"}, "no ablation 'gates'; did you mean 'gate'"),
        ((), {"ablation": "views"}, "no ablation 'views'; there are: gate, masks, losses, teachers"),
        (("comad",), {"reference": "men"}, "reference 'men' is none of the rows; there are: comad"),
        (("comad", "mean"), {"reference": "meen"}, "did you mean 'mean'"),
        (("comad",), {"baselines": ("teacher",)}, "no baseline 'teacher'; did you mean 'teachers'"),
        (("comad",), {"teacher_sets": ("dino",)}, "no teacher 'dino' in --teachers; .* mae,mocov3,ibot"),
        (("comad",), {"teacher_sets": ("m",)}, "no teacher 'm' in --teachers"),
        (("comad", "comad"), {}, "two rows have the name 'comad'"),
        (("comad",), {"seeds": (1, 1)}, "give each seed once"),
        (("comad",), {"seeds": ()}, "--seeds 0 1 2"),
        (("comad",), {"seeds": (0, -1)}, "from 0 on"),
        (("comad --run.out x",), {}, "rows share data, split and run"),
        (("comad",), {"recipe": replace(RECIPE, split="none")}, "pass --split val"),
        (("comad",), {"recipe": replace(RECIPE, method=METHODS["mean"])}, "methods come from --presets"),
        (("comad",), {"recipe": replace(RECIPE, run=replace(RECIPE.run, seed=1))}, "pass --seeds"),
        (("comad",), {"recipe": replace(RECIPE, run=replace(RECIPE.run, devices=2))}, "leave out --run.devices"),
    ],
)
def test_mistakes_name_the_remedy(presets, more, words):
    with pytest.raises(ValueError, match=words):
        entries(*presets, **more)
