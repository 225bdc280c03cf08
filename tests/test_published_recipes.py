"""``--recipe-of``: learning rates as the published commands give them, what a run says, and what has none."""

from __future__ import annotations

import pytest
import yaml

from comad.cli import main
from comad.distillation.run import of_passes
from comad.presets import METHODS, recipe
from comad.published import NOT_FOLLOWED, PUBLISHED, published
from comad.recipes import parse_distillation

RATES = {  # absolute, with the images of a step
    "comad": (1.5e-4 * 16, 4096),
    "tinymim": (1.5e-4 * 128 * 32 / 256, 128 * 32),
    "dmae": (1.5e-4 * 128 * 8 * 4 / 256, 4096),
    "g2sd": (1.5e-4 * 256 * 8 * 2 / 256, 4096),
    "dmjd": (6e-4 * 64 * 8 * (1 / 0.6) / 256, 512),
    "unic": (3e-4 * 128 * 4 / 256, 512),
    "dune": (3e-4 * 128 * 4 / 256, 512),
    "radio": (1e-3, 1024),
    "eupe": (2e-5 * 4 * (8192 / 1024) ** 0.5, 8192),
    "theia": (2e-3 * (16 * 8) / (64 * 8), 128),
    "gram": (5e-4, 1536),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_of_the_published_commands(name):
    optim = published(name).optim
    assert (optim.peak_lr, optim.images_per_step) == (pytest.approx(RATES[name][0]), RATES[name][1])


@pytest.mark.parametrize(("name", "epochs"), [("tinymim", 15), ("dmae", 20), ("dune", 20), ("theia", 5)])
def test_warm_up_of_the_published_commands(name, epochs):
    assert published(name).optim.warmup_epochs == epochs


def test_what_the_published_code_leaves_out_or_in():
    assert published("g2sd").optim.clip == 0  # it has an option for it, and never passes it on
    assert published("tinymim").drop_path == 0.1


def test_least_rates():
    assert published("unic").optim.lr(10**9, 100) == pytest.approx(1e-6)
    assert published("dune").optim.lr(10**9, 100) == pytest.approx(1e-6)
    assert published("g2sd").optim.lr(10**9, 100) == pytest.approx(2.5e-6)
    assert published("theia").optim.lr(10**9, 100) == pytest.approx(5e-4)


@pytest.mark.parametrize(("name", "steps"), [("radio", 600_000), ("eupe", 390_000)])
def test_published_steps_are_those_of_as_many_epochs_of_imagenet(name, steps):
    optim = published(name).optim
    assert optim.total_steps(1_281_167 / optim.images_per_step) == pytest.approx(steps, abs=1)


def test_every_preset_has_some_with_their_source_or_a_reason_why_not():
    assert PUBLISHED.keys() | NOT_FOLLOWED.keys() == METHODS.keys() and not PUBLISHED.keys() & NOT_FOLLOWED.keys()
    assert all(found.source for found in PUBLISHED.values())


def test_options_go_before_it_and_other_presets_may_take_it():
    config = parse_distillation(["--preset", "unic", "--recipe-of", "unic", "--optim.epochs", "7"])
    assert config.optim.epochs == 7 and config.optim.betas == (0.9, 0.99) and config.student.drop_path == 0.1
    assert config.augment.crop_scale == (0.08, 1.0) and config.settings == "the published settings of unic"
    assert parse_distillation(["--preset", "radio", "--recipe-of", "unic"]).recipe_of == "unic"
    assert parse_distillation(["--preset", "unic"]).optim == recipe("unic", demo=True).optim


@pytest.mark.parametrize(
    ("name", "words"),
    [("phi-s", "LAMB.*; known are those of comad"), ("c-radio", "gives none"), ("unik", "did you mean 'unic'")],
)
def test_what_has_none(name, words):
    with pytest.raises(ValueError, match=words):
        published(name)


def test_names_of_before_are_understood():
    config = parse_distillation(["--preset", "siglino-like"])
    assert config.method == METHODS["siglino"] and config.preset == "siglino"
    assert recipe("siglino-like", demo=True).preset == "siglino"


def test_what_passes_compute_otherwise_is_said():
    config = parse_distillation(["--preset", "unic", "--recipe-of", "unic"])
    assert of_passes(config) == "of 256 images, those of a pass, not of the whole step: moments of the teachers' tokens"
    assert of_passes(parse_distillation(["--preset", "unic"])) == ""
    assert of_passes(parse_distillation(["--preset", "comad", "--optim.microbatch", "64"])) == ""
    assert "queue" in of_passes(parse_distillation(["--preset", "gram", "--optim.microbatch", "64"]))


def test_a_run_says_and_records_whose_settings_it_has(labelled_folder, teacher_specs, tmp_path, capfd):
    student = ["image-size=16", "patch-size=4", "width=12", "depth=2", "heads=2"]
    command = ["distill", f"--data={labelled_folder}", "--teachers", *teacher_specs, "--split=none"]
    command += ["--preset=mean", "--recipe-of=comad", *(f"--student.{option}" for option in student)]
    command += ["--optim.epochs=1", "--optim.batch-size=16", "--optim.microbatch=8", "--loader.workers=0"]
    command += ["--run.no-tensorboard", f"--run.out={tmp_path / 'run'}"]
    assert main(command) == 0
    told = "".join(capfd.readouterr())
    assert "mean by the published settings of comad: 1 epochs, 16 images a step in 2 passes of 8, learning rate" in told
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe_of"] == "comad"
    assert main(["distill", "--run.resume", "--recipe-of=unic", f"--run.out={tmp_path / 'run'}"]) == 1
    assert "was started with the published settings of comad" in capfd.readouterr().err
