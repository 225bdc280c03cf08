import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import normalize

from comad.cli import main
from comad.data.images import ImageSet, Splits
from comad.data.load import load_images
from comad.evaluation.command import evaluate
from comad.evaluation.evaluation import Evaluation, Result
from comad.evaluation.features import Features, FeatureSplits
from comad.evaluation.scoreboard import (
    Candidate,
    Row,
    Scoreboard,
    count_flops,
    measure_latency,
    score,
    score_all,
    shortage,
)
from comad.exporting.package import ModelCard, export_backbone
from comad.models.timm_backbone import TimmBackbone, create_vit
from comad.runtime.seal import sealed

SIZE = 16
WIDTH, DEPTH, PATCHES = 24, 2, 16


class Stripes(ImageSet):
    """Four classes of coloured noise, in two coarse classes, two images per concept."""

    eval_crop = 1.0

    def __init__(self, name, num_images, seed):
        generator = torch.Generator().manual_seed(seed)
        self.name = name
        classes = torch.arange(num_images) % 4
        self.labels = {"fine": classes, "coarse": classes // 2}
        self.groups = torch.arange(num_images) // 8
        colours = torch.tensor([[200, 30, 30], [200, 120, 30], [30, 30, 200], [30, 120, 200]])
        noise = torch.randint(-30, 31, (num_images, 3, SIZE, SIZE), generator=generator)
        self.pixels = (colours[classes].view(-1, 3, 1, 1) + noise).byte()

    def __len__(self):
        return len(self.pixels)

    def load(self, index, min_side=0):
        return self.pixels[index]

    def path(self, index):
        return f"{self.name}/{index}"


@pytest.fixture
def splits():
    return Splits(Stripes("train", 40, 0), Stripes("val", 16, 1), Stripes("test", 24, 2), {}, "none")


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", SIZE, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=2)
    return TimmBackbone(vit)


def row(name, role="student", **values):
    scores = {"knn": values.pop("knn")} if "knn" in values else {}
    counts = {"num_images": dict.fromkeys(scores, 1700), "num_concepts": dict.fromkeys(scores, 101)}
    return Row(name=name, role=role, params=1_234_567, flops=10**9, latency_ms=1.5, scores=scores, **counts, **values)


def test_a_student_below_its_untrained_self_and_warnings_are_on_the_board():
    rows = (row("teacher", "teacher", knn=80.0), row("untrained", "untrained", knn=40.0), row("student", knn=30.0))
    below = Scoreboard(rows).below_untrained()
    assert below == ("kNN of the student, 30.0 %, is below the 40.0 % of its untrained self",)
    board = Scoreboard(rows, below)
    assert board.table().splitlines()[-1] == f"WARNING: {below[0]}" and board.as_dict()["warnings"] == list(below)
    better = Scoreboard((*rows[:2], row("student", knn=40.0)))
    assert not better.below_untrained() and "warnings" not in better.as_dict()


@pytest.mark.parametrize("role", ["student", "pixels"])
def test_score_of_easy_images(backbone, splits, role):
    result = score("x", role, None if role == "pixels" else backbone, splits, SIZE)
    assert result.row.name == "x" and result.row.role == role and result.row.reason is None
    assert set(result.correct) == set(result.groups) == {"knn", "knn_coarse", "linear", "linear_coarse"}
    for name, correct in result.correct.items():
        assert result.row.scores[name] == pytest.approx(100 * correct.double().mean().item())
        assert result.row.scores[name] > 60
        assert result.row.num_images[name] == 24 and result.row.num_concepts[name] == 3
        assert result.groups[name].tolist() == splits.test.groups.tolist()
    assert (result.row.choices["pool_knn"] == "pixels") == (role == "pixels")
    assert (result.row.params == 0) == (role == "pixels")
    assert result.row.choices["k"] in (1, 5, 10, 20, 50) and result.row.knn_share is None
    plain = result.row.as_dict()
    assert plain["knn"] == result.row.scores["knn"] and plain["k"] and plain["finetune"] is None


def test_coarse_labels_are_optional(splits):
    del splits.val.labels["coarse"]
    result = score("x", "pixels", None, splits, SIZE)
    assert set(result.row.scores) == set(result.correct) == {"knn", "linear"}
    assert result.row.as_dict()["knn_coarse"] is None


@pytest.mark.parametrize("known, reason", [(0, "0 train images"), (19, "19 train images"), (None, "0 train images")])
def test_too_few_labels_give_a_reason(backbone, splits, known, reason):
    if known is None:
        splits.train.labels.clear()
    else:
        splits.train.labels["fine"][known:] = -1
    result = score("x", "student", backbone, splits, SIZE)
    assert result.row.scores == {} and result.row.as_dict()["knn"] is None and reason in result.row.reason
    assert result.row.params > 0 and result.correct == {}


def test_one_class_or_an_empty_test_split_is_too_little(splits):
    assert shortage(splits, "fine") is None
    splits.test.labels["fine"].fill_(-1)
    assert "no image of test" in shortage(splits, "fine")
    splits.train.labels["fine"].fill_(0)
    assert "1 fine class" in shortage(splits, "fine")


def test_flops_are_those_of_the_formula(backbone):
    n, d = PATCHES + 1, WIDTH
    block = n * 12 * d * d + 2 * n * n * d
    assert count_flops(backbone, SIZE) == 2 * (PATCHES * 48 * d + DEPTH * block)
    assert measure_latency(backbone, SIZE, num_runs=3) > 0


def test_board_shares_writes_and_shows(tmp_path):
    rows = (row("a", "teacher", knn=80.0), row("b", "teacher", knn=50.0), row("s", knn=60.0), row("u", reason="why"))
    board = Scoreboard(rows)
    assert [r.knn_share for r in board.shared_rows] == [100, 62.5, 75, None]
    path = tmp_path / "run" / "scoreboard.json"
    board.write(path)
    assert json.loads(path.read_text()) == sealed(board.as_dict())
    assert board.as_dict()["rows"][2]["knn_share"] == 75
    assert os.listdir(path.parent) == ["scoreboard.json"]
    lines = board.table().splitlines()
    assert len(lines) == 8 and "1,234,567" in lines[2] and lines[-1] == "no scores: why"
    assert lines[-2] == "kNN: 1,700 test images of 101 concepts, one seed"
    assert lines[4].split()[:2] == ["s", "student"] and lines[4].split()[5:7] == ["60.0", "75.0"]


def test_board_without_teacher_has_no_shares():
    assert Scoreboard((row("s", knn=60.0),)).shared_rows[0].knn_share is None


def test_an_evaluation_of_a_plugin_is_on_every_board(backbone, splits, monkeypatch):
    monkeypatch.setattr(Evaluation, "members", dict(Evaluation.members))

    @dataclass(frozen=True, kw_only=True)
    class Luck(Evaluation, name="luck"):
        title = "good luck"
        share: float = 0.5

        def __call__(self, features, device="cpu"):
            count = len(features.test.groups)
            return Result(self.results(features, {"fine": torch.full((count,), self.share)}), {"drawn": count})

    result = score("x", "student", backbone, splits, SIZE)
    assert result.row.scores["luck"] == 50 and result.row.num_images["luck"] == 24
    board = Scoreboard((result.row,))
    assert "good luck %" in board.table() and board.as_dict()["rows"][0]["luck"] == 50
    assert board.as_dict()["rows"][0]["drawn"] == 24
    only = score("x", "student", backbone, splits, SIZE, evaluations=("knn", Luck(share=0.25)))
    assert set(only.row.scores) == {"knn", "knn_coarse", "luck"} and only.row.scores["luck"] == 25
    with pytest.raises(ValueError, match="no evaluation 'luk'; did you mean 'luck'"):
        score("x", "student", backbone, splits, SIZE, evaluations=("luk",))


def test_the_example_of_an_evaluation_is_on_the_board_of_its_command(
    labelled_folder, teacher_specs, monkeypatch, capsys
):
    monkeypatch.setattr(Evaluation, "members", dict(Evaluation.members))
    file = Path(__file__).parents[2] / "docs" / "adding" / "nearest_mean.py"
    command = next(line for line in file.read_text().splitlines() if line.startswith("comad evaluate "))
    places = {"BACKBONE": teacher_specs[0], "FOLDER": labelled_folder, "docs/adding/nearest_mean.py": file}
    assert main([str(places.get(word, word)) for word in command.split()[1:]]) == 0
    assert "nearest mean %" in capsys.readouterr().out

    generator = np.random.default_rng(0)
    labels = {part: np.arange(40) % 4 for part in ("train", "val", "test")}
    rows = {part: generator.normal(size=(40, 6)) + np.eye(6)[known] for part, known in labels.items()}
    pools = {"noise": generator.normal(size=(40, 6)), "cls": rows["train"]}
    parts = [pools, *({"noise": generator.normal(size=(40, 6)), "cls": rows[part]} for part in ("val", "test"))]
    features = FeatureSplits(
        *(
            Features(
                {name: torch.tensor(x) for name, x in part.items()},
                {"fine": torch.tensor(labels["train"])},
                torch.arange(40),
            )
            for part in parts
        )
    )
    means = np.stack([rows["train"][labels["train"] == label].mean(axis=0) for label in range(4)])
    cosines = normalize(rows["test"]) @ normalize(means).T
    found = Evaluation.choose("nearest-mean")(features)
    assert found.choices == {"pool_nearest_mean": "cls"}
    assert found.scores["nearest-mean"].correct.tolist() == (cosines.argmax(axis=1) == labels["test"]).tolist()


def test_images_are_decoded_once_for_all_rows_and_scores_are_those_of_each_alone(splits):
    torch.manual_seed(0)
    sizes = (SIZE, 24)
    backbones = [
        TimmBackbone(create_vit("vit_tiny_patch16_224", size, patch_size=4, embed_dim=24, depth=1, num_heads=2))
        for size in sizes
    ]
    alone = [score("x", "teacher", backbone, splits) for backbone in backbones]
    loaded = Counter()
    for images in splits[:3]:
        real = images.load
        images.load = lambda index, side=0, real=real, name=images.name: loaded.update([(name, index)]) or real(index)
    candidates = [Candidate("pixels", "pixels", None), *(Candidate("x", "teacher", backbone) for backbone in backbones)]
    together = score_all(candidates, splits)
    assert set(loaded.values()) == {1} and len(loaded) == 40 + 16 + 24
    assert [part.row.scores for part in together[1:]] == [part.row.scores for part in alone]


def test_reduced_precision_is_of_the_features_alone(backbone, splits):
    full, half = (score("x", "student", backbone, splits, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.row.flops == full.row.flops and abs(half.row.scores["knn"] - full.row.scores["knn"]) < 10


def test_evaluate_takes_objects(backbone, splits):
    board = evaluate(backbone, splits, evaluations=("knn",))
    assert [row.role for row in board.rows] == ["pixels", "teacher"] and board.rows[1].name == "TimmBackbone"
    assert board.rows[1].scores == score("x", "teacher", backbone, splits, evaluations=("knn",)).row.scores
    assert set(board.rows[0].scores) == {"knn", "knn_coarse"}
    for mistake, words in (({"precision": "fp8"}, "fp32, bf16"), ({"image_size": 32}, "built for images of 16 pixels")):
        with pytest.raises(ValueError, match=words):
            evaluate(backbone, splits, **mistake)
    splits.train.labels.clear()
    with pytest.raises(ValueError, match=r"'train' cannot be scored: 0 train images .* one sub-folder per label"):
        evaluate(backbone, splits)


@pytest.mark.parametrize("name", ["{folder}", "student={folder}", "{folder}/model.safetensors"])
def test_an_exported_student_is_scored_at_its_own_size(labelled_folder, tmp_path, name):
    torch.manual_seed(3)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = create_vit("vit_tiny_patch16_224", 32, **{key: arguments[key] for key in list(arguments)[1:]})
    student, splits = TimmBackbone(vit, token_types=("cls", "patch")), load_images(str(labelled_folder))
    facts = {"preset": "x", "seed": 0, "images_seen": 0, "data": "x", "data_licence": "none", "eval_crop": 0.875}
    types = {"architecture": "vit_tiny_patch16_224", "token_types": student.token_types}
    card = ModelCard(name="s", licence="mit", about="", **types, **facts)
    folder = export_backbone(student, tmp_path / "student", model_args=arguments, card=card)
    own = score("student", "student", student, splits, 32)
    row = evaluate(name.format(folder=folder), str(labelled_folder)).rows[1]
    assert row.flops == own.row.flops and row.scores == own.row.scores
    other = evaluate(str(folder), str(labelled_folder), image_size=16).rows[1]
    assert other.flops < row.flops
