"""Members of slots from outside: the files of docs/adding, as a user runs them; and what the slots refuse."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import comad
from comad.cli import main
from comad.distillation.aligners import AutoencoderAdapter
from comad.distillation.config import DistillConfig
from comad.distillation.fusion import Fusion, Gate, Mean
from comad.distillation.masking import Superset
from comad.distillation.method import Method
from comad.distillation.objectives import DISTANCES, Objective
from comad.presets import METHODS
from comad.recipes import SLOTS, parse_distillation
from comad.runtime.checkpoint import checkpoints
from comad.runtime.command import docs_of
from comad.runtime.options import NO_EFFECT, identity_of
from comad.runtime.slots import load_plugins

ADDING = Path(__file__).parents[2] / "docs" / "adding"
FILES = [path for path in sorted(ADDING.glob("*.py")) if "comad distill --plugin" in path.read_text()]


@pytest.fixture(scope="module", autouse=True)
def only_here():
    """What the files add is gone after these tests."""
    tables = [*(slot.members for slot in (*SLOTS.values(), Objective)), DISTANCES]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
    for name in [name for name in sys.modules if name.startswith("comad_plugin_")]:
        del sys.modules[name]


def example(path: Path) -> list[str]:
    """The options of the command in the docstring of a file."""
    line = next(line for line in path.read_text().splitlines() if line.startswith("comad distill "))
    return line.replace("docs/adding", str(ADDING)).split()[2:]


EXAMPLES = {path.stem: example(path) for path in FILES}
TOGETHER = [option for options in EXAMPLES.values() for option in options]
OPTIONS = [
    *("--student.image-size=16", "--student.patch-size=4", "--student.width=12", "--student.depth=2"),
    *("--student.heads=2", "--optim.epochs=1", "--optim.batch-size=11", "--optim.warmup-epochs=0.5", "--split=none"),
    *("--run.precision=fp32", "--run.log-every=1", "--run.no-tensorboard", "--loader.workers=0"),
]


@pytest.fixture(scope="module")
def command(labelled_folder, teacher_specs):
    def build(out, *more):
        sources = ["--preset=comad", "--data", str(labelled_folder), "--teachers", *teacher_specs]
        return ["distill", *sources, *OPTIONS, f"--run.out={out}", *more]

    return build


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run with a member of every slot, all from outside."""
    out = tmp_path_factory.mktemp("outside") / "run"
    assert main(command(out, *TOGETHER, "--run.checkpoint-every=2")) == 0
    return out


def test_a_run_with_members_of_your_own_records_them(finished):
    method = yaml.safe_load((finished / "config.yaml").read_text())["method"]
    names = {slot: method[slot]["name"] for slot in SLOTS}
    assert names == {
        "masking": "block",
        "features": "last-blocks",
        "normalizer": "clip",
        "aligner": "random-projection",
        "fusion": "router",
    }
    assert method["fusion"]["temperature"] == 2.0 and method["masking"]["mask_ratio"] == 0.6
    assert method["objectives"]["pool"] == {
        "name": "attention-pooled", "teachers": "all", "weight": 0.5, "queries": 1
    }  # fmt: skip
    assert method["objectives"]["token"]["distance"] == "largest"
    numbers = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert numbers[0]["loss/pool"] > 0 and 0 < numbers[0]["share_first"] < 1


def test_their_parameters_are_trained_and_in_the_checkpoint_and_a_run_goes_on_bitwise(finished, command):
    student = (finished / "student" / "model.safetensors").read_bytes()
    first, *_, last = (torch.load(path, weights_only=False)["module"] for path in checkpoints(finished / "checkpoints"))
    for name in ("fusion.weight", "objectives.pool.0"):
        assert not torch.equal(first[name], last[name])
    assert torch.equal(first["aligner.0.weight"], last["aligner.0.weight"])
    checkpoints(finished / "checkpoints")[-1].unlink()
    assert main(command(finished, *TOGETHER, "--run.checkpoint-every=2", "--run.resume")) == 0
    assert (finished / "student" / "model.safetensors").read_bytes() == student


def test_resume_with_another_option_of_your_own_is_refused_and_named(finished, command, capfd):
    assert main(command(finished, *TOGETHER, "--fusion.temperature=3", "--run.resume")) == 1
    assert "method.fusion.temperature: 2.0 → 3.0" in capfd.readouterr().err


def test_the_recipe_of_such_a_run_brings_its_plugins(finished):
    config = parse_distillation(["--recipe", str(finished / "config.yaml")])
    assert config.method.fusion.name == "router" and len(config.plugin) == len(FILES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_is_listed_by_help_with_its_options(name, capsys):
    options = EXAMPLES[name]
    with pytest.raises(SystemExit) as end:
        main(["distill", *options, "--help-all"])
    assert end.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for flag, value in zip(options[2::2], options[3::2], strict=True):
        chosen = re.fullmatch(r"--(objectives\.)?\w+", flag)
        assert (value if chosen else flag) in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_trains_alone(name, small_distillation, capsys):
    method = parse_distillation(EXAMPLES[name]).method
    losses = small_distillation(method).losses_on_one_batch(5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fusion", "men"], "no fusion 'men'; did you mean 'mean'?"),
        (["--masking=supersat"], "no masking 'supersat'; did you mean 'superset'?"),
        (["--objectives.token", "featur"], "no objective 'featur'; did you mean 'feature'?"),
        (["--plugin", "nowhere.py"], "no plugin 'nowhere.py'"),
        (["--plugin", __file__.replace(".py", ".txt")], "no plugin"),
        (["--preset=comad", "--objectives.token=none", "--objectives.spatial=none"], "no objective has a weight"),
        (["--objectives.tokens=none"], "no objective 'tokens' to take away"),
        (["--preset=consensus", "--masking.mask-ratio=0.8"], "no option of masking 'none'; choose --masking superset|"),
        (["--preset=comad", "--fusion.power", "2"], "no option of fusion 'gate'; choose --fusion consensus"),
    ],
)
def test_a_wrong_choice_is_told_in_one_line(arguments, words, capsys):
    assert main(["distill", *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_a_plugin_that_fails_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    for _ in range(2):  # it is not taken for loaded
        assert main(["distill", "--plugin", str(tmp_path / "broken.py")]) == 1
        assert "broken.py' fails: ModuleNotFoundError: No module named 'nowhere_at_all'" in capsys.readouterr().err


def test_a_member_of_your_own_may_be_made_in_python(small_distillation):
    @dataclass(frozen=True, kw_only=True)
    class First(Fusion, name="first"):
        one_target = True

        def __call__(self, state, pairs):
            return Mean()(state, pairs[:1])[0], torch.stack([pair.valid.float() * (pair is pairs[0]) for pair in pairs])

    method = replace(METHODS["comad"], fusion=First())
    assert parse_distillation(["--preset=comad", "--fusion", "first"]).method == method
    _, metrics = (setting := small_distillation(method, with_cls=(True,) * 3)).distiller(*setting.batch(4))
    assert float(metrics()["share_teacher-0"]) == pytest.approx(1.0)


# --- options


def test_objectives_are_added_replaced_and_taken_away():
    changes = ["--objectives.spatial=none", "--objectives.gram", "relation", "--objectives.gram.temperature=0.5"]
    objectives = parse_distillation(["--preset=comad", *changes]).method.objectives
    assert list(objectives) == ["token", "gram"] and objectives["gram"].temperature == 0.5
    assert objectives["token"] == METHODS["comad"].objectives["token"]


def test_choosing_a_member_keeps_the_other_slots_of_the_preset():
    method = parse_distillation(["--preset", "unic", "--fusion=sum"]).method
    assert replace(method, fusion=METHODS["unic"].fusion) == METHODS["unic"] and method.fusion.name == "sum"


SPATIAL_TWICE = {
    "objectives": {
        **METHODS["comad"].objectives,
        "spatial": replace(METHODS["comad"].objectives["spatial"], weight=2.0),
    }
}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("--method.masking.student=0.8", "--masking.mask-ratio", {"masking": Superset(mask_ratio=0.8)}),
        ("--method.fusion.kind=mean", "--fusion", {"fusion": Mean()}),
        ("--method.fusion.renormalise", "--fusion.renormalize", {"fusion": Gate(renormalize=True)}),
        ("--method.masking.unmasked-share=0.1", "--masking.unmasked-share", {"masking": Superset(unmasked_share=0.1)}),
        ("--method.fusion.no-detached", "--fusion.no-detached", {"fusion": Gate(detached=False)}),
        ("--method.aligner.kind=anchor", "--aligner", {"aligner": AutoencoderAdapter()}),
        ("--method.aligner.kind anchor", "--aligner", {"aligner": AutoencoderAdapter()}),
        ("--method.normalize.kind plain", "--normalizer", {}),
        ("--method.terms.spatial.weight 2", "--objectives.spatial.weight", SPATIAL_TWICE),
        ("--method.decoder-depth=2", "--masking.decoder-depth", {"masking": Superset(decoder_depth=2)}),
    ],
)
def test_options_of_the_first_version_are_understood_and_told(old, new, expected, capsys):
    assert parse_distillation(["--preset=comad", *old.split()]).method == replace(METHODS["comad"], **expected)
    assert capsys.readouterr().err == f"comad: {re.split('[= ]', old)[0]} is called {new} now.\n"


def test_whether_an_option_changes_the_result_is_said_once_on_its_field():
    @dataclass(frozen=True)
    class Inner:
        cost: int = field(default=1, metadata=NO_EFFECT)
        ratio: float = 0.5

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        many: tuple[Inner, ...] = (Inner(), Inner(ratio=1.0))
        fusion: Fusion = field(default_factory=Gate)
        where: str = field(default="here", metadata=NO_EFFECT)

    found = identity_of(Outer())
    assert found["inner"] == {"ratio": 0.5} and found["many"] == [{"ratio": 0.5}, {"ratio": 1.0}]
    assert found["fusion"]["name"] == "gate" and "where" not in found
    assert identity_of(Outer(inner=Inner(cost=9), where="there")) == found
    assert identity_of(Outer(fusion=Mean())) != found != identity_of(Outer(inner=Inner(ratio=0.4)))


# --- help


def options_of(value: object, prefix: str = "") -> dict[str, tuple[type, str]]:
    """Dotted option → the class and the field that it stands for."""
    found = {}
    for part in fields(value):
        inner = getattr(value, part.name)
        name = f"{prefix}{part.name}"
        if is_dataclass(inner):
            found |= options_of(inner, f"{name}.")
        elif isinstance(inner, dict):
            for key, each in inner.items():
                found |= options_of(each, f"{name}.{key}.")
        else:
            found[name] = (type(value), part.name)
    return found


def test_every_option_has_a_sentence():
    kinds = {kind for method in METHODS.values() for kind, _ in options_of(DistillConfig(method=method)).values()}
    kinds |= {member for slot in (*SLOTS.values(), Objective) for member in slot.members.values()} | {Method}
    missing = [
        f"{kind.__name__}.{part.name}" for kind in kinds for part in fields(kind) if not docs_of(kind).get(part.name)
    ]
    assert not missing


def flags(capsys, *arguments: str) -> set[str]:
    with pytest.raises(SystemExit) as end:
        main(["distill", *arguments])
    assert end.value.code == 0
    out = capsys.readouterr().out
    return set(re.findall(r"^\W*(?:-h, )?(--[\w.-]+)", out, flags=re.MULTILINE))


def test_the_first_screen_of_help_shows_what_most_people_set_and_help_all_everything(capsys):
    short, everything = flags(capsys, "--help"), flags(capsys, "--help-all")
    assert 15 <= len(short) <= 32 and short < everything
    assert {"--data", "--teachers", "--optim.epochs", "--run.out"} <= short
    suppressed = {"extra_students", "preset", "recipe_of", "plugin", "method.single_teacher"}
    for name in options_of(parse_distillation([])).keys() - suppressed:
        assert "--" + name.removeprefix("method.").replace("_", "-") in everything, name


def test_shown_defaults_are_those_that_will_be_used(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--preset", "unic", "--help-all"])
    text = capsys.readouterr().out
    assert "--fusion.probability" in text and "--aligner.separate-cls" in text and "multi-layer" in text
    assert "--fusion.temperature" not in text


def test_a_fusion_may_be_a_module_with_state(small_distillation):
    load_plugins([str(ADDING / "learned_router.py")])
    setting = small_distillation(replace(METHODS["comad"], fusion=Fusion.choose("router")))
    assert isinstance(setting.distiller.fusion, nn.Linear)
    loss, _ = setting.distiller(*setting.batch(8))
    loss.backward()
    assert setting.distiller.fusion.weight.grad.abs().sum() > 0


def test_python_of_the_page_on_adding(small_distillation, monkeypatch):
    page = (ADDING.parent / "adding.md").read_text(encoding="utf-8")
    member, call = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    exec(member, {"__name__": __name__})
    setting = small_distillation(replace(METHODS["comad"], fusion=Fusion.choose("hardest")))
    loss, metrics = setting.distiller(*setting.batch(8))
    assert loss.isfinite() and sum(value for name, value in metrics().items() if name.startswith("share_")) > 0
    called = {}
    monkeypatch.setattr(comad, "distill", lambda **options: called.update(options), raising=False)
    exec(call, {})
    assert called["method"].fusion.name == "loss-gate" and called["method"].objectives == METHODS["unic"].objectives
