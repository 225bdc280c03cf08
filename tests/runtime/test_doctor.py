import re
import tomllib
from pathlib import Path

import pytest

from comad.cli import VERBS, main
from comad.runtime import completion, doctor
from comad.runtime.doctor import Machine, advice

ROOT = Path(__file__).parents[2]
PLAIN = Machine(8, "AVX512", False, (), "", False, 10**10, 10**11, 10**10, "/usr/bin/g++", ())


def test_it_says_what_there_is(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for name in ("comad", "CPU", "GPU", "memory", "disk", "/dev/shm", "C++ compiler", "optional packages", "torch"):
        assert name in told
    assert re.search(r"^CPU +\d+ cores", told, flags=re.MULTILINE)
    assert main(["doctor", "--fast"]) == 1 and "takes no options" in capsys.readouterr().err


def test_every_extra_of_the_package_has_a_use():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() - {"dev", "docs", "browser"} == doctor.EXTRAS.keys()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "--teacher-precision int8"),
        ({"compiler": ""}, "apt install g++"),
        ({"simd": "AVX2"}, "runs compute in fp32"),
        ({"nvidia": True}, "CUDA build"),
        ({"nvidia": True, "cuda": "13.0"}, "nvidia-smi"),
        ({"cuda": "13.0"}, "CPU build"),
        ({"missing": ("fast",)}, "comad[fast]"),
        ({"shm": 64_000_000}, "--shm-size"),
        ({"disk": 10**9}, "--cache-folder"),
    ],
)
def test_what_would_help(changed, words):
    assert words in " ".join(advice(PLAIN._replace(**changed)))


def test_nothing_helps_a_machine_that_has_everything():
    gpu = PLAIN._replace(gpus=(("H200", 10**11),), nvidia=True, cuda="13.0")
    assert advice(gpu) == []


def test_a_package_that_is_not_installed_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ['nowhere>=1; extra == "heic"', "torch>=2"])
    assert doctor.missing_extras() == ("heic",)


def test_completion_knows_verbs_options_and_values(capsys):
    options = completion.options_of(VERBS["export"][1])
    assert "--to" in options and options["--image-size"] == []
    options = completion.options_of(VERBS["report"][1])
    plan = {"plan": {"--run.precision": ["bf16", "fp32"]}}
    bash = completion.script("bash", {"report": options} | plan)
    assert 'words="report plan"' in bash and '"plan --run.precision") words="bf16 fp32"' in bash
    assert completion.script("zsh", {}).startswith("autoload")
    assert "-l run.precision -x -a 'bf16 fp32'" in completion.script(
        "fish", {"plan": {"--run.precision": ["bf16", "fp32"]}}
    )
    assert main(["completion", "tcsh"]) == 1 and "bash|zsh|fish" in capsys.readouterr().err
    assert main(["completion", "--help"]) == 0 and "bash-completion" in capsys.readouterr().out
