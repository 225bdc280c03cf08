import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from comad.cli import main
from comad.data.load import load_images
from comad.evaluation import classifier as classifier_module
from comad.evaluation import finetune as finetune_module
from comad.evaluation.finetune import PretrainedModel, check, finetune_backbone
from comad.evaluation.scores import read_scores
from comad.evaluation.tuning import PAPER, RECIPES, SMALL, FinetuneConfig, recipe
from comad.evaluation.views import load_one
from comad.runtime.checkpoint import checkpoints

SHORT = ["--image-size=16", "--optim.epochs=6", "--optim.batch-size=8", "--optim.warmup-epochs=1", "--loader.workers=0",
         "--optim.base-lr=0.1", "--run.log-every=1", "--run.no-tensorboard", "--run.precision=fp32"]  # fmt: skip


@pytest.fixture(scope="module")
def command(labelled_folder, teacher_specs):
    def build(out, *more, backbone=teacher_specs[0]):
        return ["evaluate", "finetune", backbone, f"--data={labelled_folder}", *SHORT, f"--run.out={out}", *more]

    return build


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune") / "whole"
    assert main(command(out, "--drop-path=0.2")) == 0
    return out


def failure(capfd, arguments):
    assert main(list(map(str, arguments))) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("comad: "))
    return line


def final_weights(out):
    return torch.load(checkpoints(out / "checkpoints")[-1], weights_only=True)["module"]


def test_separable_classes_are_learnt_and_every_result_is_kept(finished, labelled_folder, capsys):
    (score,), facts = read_scores(finished / "finetune.json")
    assert score.row.scores["finetune"] > 80 and "finetune_coarse" not in score.row.scores
    test = load_images(str(labelled_folder)).test
    assert len(score.correct["finetune"]) == len(test) and torch.equal(score.groups["finetune"], test.groups)
    assert score.row.scores["finetune"] == pytest.approx(100 * score.correct["finetune"].double().mean().item())
    assert facts["images_seen"] == 6 * len(load_images(str(labelled_folder)).train) and facts["seconds"] > 0
    assert facts["trials"][0]["validation"]["fine"] > 80 and facts["code"] and facts["seed"] == 0
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["finetune"] == facts["trials"][0]["validation"]["fine"]
    for name in ("fine", "loss", "grad_norm", "data_wait"):
        assert isinstance(lines[-2][name], float)


@pytest.mark.parametrize("mixing", [[], ["--mixup=0", "--cutmix=0"]])
def test_a_stopped_run_goes_on_to_bitwise_the_same_weights(command, finished, tmp_path, monkeypatch, mixing):
    whole, part, calls, real = tmp_path / "whole", tmp_path / "part", [], finetune_module.mix

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "mix", stopped)
        assert main(command(part, "--drop-path=0.2", *mixing)) == 130
    assert [path.name for path in checkpoints(part / "checkpoints")] == ["step-00000011.pt"]
    assert main(command(part, "--drop-path=0.2", "--run.resume", *mixing)) == 0
    if mixing:
        assert main(command(whole, "--drop-path=0.2", *mixing)) == 0
    a, b = final_weights(part), final_weights(whole if mixing else finished)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_settings_are_chosen_on_validation_and_the_test_images_are_seen_once(
    command, tmp_path, monkeypatch, labelled_folder
):
    seen, real = [], finetune_module.correct_answers

    def watched(classifier, images, *rest):
        seen.append(images.name.split("/")[-1])
        return real(classifier, images, *rest)

    monkeypatch.setattr(finetune_module, "correct_answers", watched)
    out = tmp_path / "run"
    options = ["--try-lr", "1e-9", "0.1", "--try-epochs", "1", "3"]
    assert main(command(out, *options)) == 0
    assert seen.count("test") == 1 and seen[-1] == "test"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "lr-0.1-epochs-1", "lr-0.1-epochs-3", "lr-1e-09-epochs-1", "lr-1e-09-epochs-3"]  # fmt: skip
    facts = read_scores(out / "finetune.json").facts
    values = [trial["validation"]["fine"] for trial in facts["trials"]]
    assert facts["chosen"] == values.index(max(values)) and facts["trials"][facts["chosen"]]["base_lr"] == 0.1

    os.remove(out / "finetune.json")
    for path in (out / "lr-0.1-epochs-3" / "checkpoints").iterdir():
        path.unlink()  # killed before the first checkpoint of the last trial
    assert main(command(out, *options, "--run.resume")) == 0
    again = read_scores(out / "finetune.json").facts
    assert again["trials"] == facts["trials"] and again["chosen"] == facts["chosen"]
    assert len((out / "lr-0.1-epochs-3" / "log.jsonl").read_text().splitlines()) == 22


def test_the_validation_images_can_be_scored_in_place_of_the_test_images(
    command, tmp_path, monkeypatch, labelled_folder
):
    monkeypatch.setattr(classifier_module, "evaluation_batches", _refusing_test(classifier_module.evaluation_batches))
    assert main(command(tmp_path / "run", "--split=val", "--optim.epochs=1")) == 0
    (score,), facts = read_scores(tmp_path / "run" / "finetune.json")
    assert facts["split"] == "val" and len(score.correct["finetune"]) == len(load_images(str(labelled_folder)).val)


def _refusing_test(real):
    def batches(images, *rest):
        assert not images.name.endswith("/test")
        return real(images, *rest)

    return batches


def test_fine_and_coarse_are_learnt_together_and_unlabelled_images_do_no_harm(labelled_folder, teacher_specs, tmp_path):
    splits = load_images(str(labelled_folder))
    for part in (splits.train, splits.val, splits.test):
        part.labels["coarse"] = (part.labels["fine"] == 0).long()
    splits.train.labels["fine"][::7] = -1
    teacher = load_one(teacher_specs[0], "x", 16)
    tuning = RECIPES["small"]
    optim = replace(tuning.optim, epochs=6.0, batch_size=8, base_lr=0.05)
    run = replace(FinetuneConfig(backbone="").run, out=str(tmp_path / "run"), precision="fp32", tensorboard=False)
    config = FinetuneConfig(backbone="", tuning=replace(tuning, optim=optim), run=run)
    before = {name: tensor.clone() for name, tensor in teacher.backbone.state_dict().items()}
    done = finetune_backbone(config, PretrainedModel("x", "student", teacher.backbone, {}), splits)
    assert done is not None and set(done.score.correct) == {"finetune", "finetune_coarse"}
    assert (
        min(done.score.row.scores.values()) > 80
        and len(done.score.row.scores) == 2
        and done.score.row.role == "student"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.backbone.parameters())


@pytest.mark.parametrize("backbone", ["resnet18:random", "vit_tiny_patch16_224:random"])
def test_any_backbone_can_be_fine_tuned(command, tmp_path, backbone):
    more = ["--image-size=32", "--optim.epochs=1", "--optim.batch-size=28"]
    assert main(command(tmp_path / "run", *more, backbone=backbone)) == 0
    assert read_scores(tmp_path / "run" / "finetune.json").scores[0].row.params > 5e6


def test_attention_heads_are_those_of_the_export(command, tmp_path, teacher_specs, monkeypatch):
    heads = []

    def watched(backbone, rate):
        heads.extend(block.attn.num_heads for block in backbone.vit.blocks)

    monkeypatch.setattr(finetune_module, "set_drop_path", watched)
    assert main(command(tmp_path / "run", "--optim.epochs=1")) == 0
    model = timm.create_model(f"local-dir:{teacher_specs[0].split('=')[1]}", pretrained=True)
    assert set(heads) == {block.attn.num_heads for block in model.blocks} == {2}


def test_recipes():
    assert recipe("", "stamps") == SMALL and recipe("", "my/folder") == PAPER and recipe("paper", "stamps") == PAPER
    assert (PAPER.optim.epochs, PAPER.optim.peak_lr, PAPER.optim.weight_decay) == (100, 1e-3, 0.05)
    with pytest.raises(ValueError, match=r"no preset 'smal' to fine-tune with; did you mean 'small'\?"):
        recipe("smal", "stamps")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optim.batch-size=7"], "no multiple of 2; change --optim.batch-size"),
        (["--optim.batch-size=64"], "too few to fine-tune with a batch of 64"),
        (["--layer-decay=1.5"], "--layer-decay 1.5 is out of range"),
        (["--drop-path=1"], "--drop-path is a share"),
        (["--preset=papper"], "did you mean 'paper'?"),
        (["--run.resume"], "no checkpoint to resume"),
    ],
)
def test_mistakes_are_told_in_one_line(command, tmp_path, capfd, more, words):
    assert words in failure(capfd, command(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_run_refuses_to_go_on_with_other_images(command, finished, labelled_folder, tmp_path, capfd):
    out = shutil.copytree(finished, tmp_path / "run")
    assert len(np.load(out / "data.npy")) == len(load_images(str(labelled_folder)).train)
    data = shutil.copytree(labelled_folder, tmp_path / "data")
    resume = command(out, "--drop-path=0.2", "--run.resume", f"--data={data}")
    assert main(resume) == 0  # the same ones, in another place
    train = load_images(str(data)).train
    os.remove(train.path(3))
    assert "its images are not those it was started with: 1 image removed" in failure(capfd, resume)


def test_a_run_is_not_overwritten_and_labels_are_needed(command, finished, tmp_path, capfd, write_images):
    assert "--run.resume" in failure(capfd, command(finished))
    write_images(tmp_path, [f"{i}.png" for i in range(30)])
    arguments = ["evaluate", "finetune", "vit_tiny_patch16_224:random", "--data", tmp_path]
    assert "one sub-folder per label" in failure(capfd, arguments)
    assert "name what to fine-tune" in failure(capfd, ["evaluate", "finetune", "--data", tmp_path])


def test_another_backbone_does_not_go_on_where_one_stopped(command, finished, capfd, teacher_specs):
    message = failure(capfd, command(finished, "--drop-path=0.2", "--run.resume", backbone=teacher_specs[1]))
    assert "subject.sha256" in message and "another setup" in message


def test_a_batch_of_pairs_is_asked_for_only_if_images_are_mixed(labelled_folder):
    splits = load_images(str(labelled_folder))
    odd = replace(SMALL, optim=replace(SMALL.optim, batch_size=7), mixup=0.0, cutmix=0.0)
    check(FinetuneConfig(backbone="x", tuning=odd), splits)
