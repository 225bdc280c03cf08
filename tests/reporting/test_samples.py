import json
import random

import numpy as np
import pytest
import torch

from comad.reporting.samples import (
    Classes,
    Neighbours,
    changed_options,
    collect,
    feature_colours,
    lost_by_student,
    read_samples,
    square,
    write_facts,
)
from comad.runtime.seal import sealed

IMAGES = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)


def features(seed, width=10, patches=16, images=3):
    return np.random.default_rng(seed).standard_normal((images, patches, width))


def test_what_was_collected_comes_back(tmp_path):
    mask, gate = torch.arange(12).view(3, 4) % 3 == 0, torch.rand(3, 4).bfloat16()
    thumbnails = {7: IMAGES[0], 3: IMAGES[1], 9: IMAGES[2]}
    numbers = torch.tensor([[7, 3], [9, 7], [3, 9]])
    path = collect(
        tmp_path,
        IMAGES,
        masks={"student": mask},
        gate={"a": gate},
        features={"a": features(0), "student": torch.from_numpy(features(1)).bfloat16()},
        neighbours=Neighbours({"a": numbers}, thumbnails),
        classes=Classes(["x", "y"], torch.tensor([0, 1, 1]), [IMAGES[2]], [1]),
    )
    found = read_samples(path)
    assert np.array_equal(found.images, IMAGES)
    assert np.array_equal(found.masks["student"], mask.view(3, 2, 2).numpy())
    assert np.abs(found.gate["a"] - gate.float().view(3, 2, 2).numpy()).max() <= 0.5 / 255 + 1e-6
    assert {name: part.shape for name, part in found.colours.items()} == {"a": (3, 4, 4, 3), "student": (3, 4, 4, 3)}
    assert found.class_names == ("x", "y") and found.labels.tolist() == [0, 1, 1] and found.lost_labels.tolist() == [1]
    shown = found.thumbnails[found.neighbours["a"]]
    assert all(np.array_equal(shown[i, k], square(thumbnails[int(numbers[i, k])])) for i in range(3) for k in range(2))
    assert [file.name for file in tmp_path.iterdir()] == ["report.npz"]


def test_images_alone_are_enough(tmp_path):
    found = read_samples(collect(tmp_path, IMAGES))
    assert not found.masks and not found.neighbours and not found.labels.size and not found.lost.size


def test_colours_do_not_depend_on_rotation_scale_or_width():
    target = features(0) * np.array([9, 7, 5, *[0.1] * 7])
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))[0]
    wider = np.concatenate([target @ rotation * 3 + 5, np.zeros((3, 16, 4))], axis=2)
    colours, explained = feature_colours({"target": target, "student": wider})
    assert np.abs(colours["target"].astype(int) - colours["student"]).max() <= 1
    assert explained["target"] == pytest.approx(explained["student"]) and explained["target"] > 0.95
    scores = target.reshape(-1, 10)[:, :3]
    assert colours["target"].reshape(-1, 3).std(axis=0).min() > 30 and scores.shape == (48, 3)


def test_colours_of_another_grid_and_of_constant_features():
    coarse = np.repeat(np.repeat(features(0, patches=4).reshape(3, 2, 2, 10), 2, axis=1), 2, axis=2)
    colours, explained = feature_colours(
        {"target": coarse.reshape(3, 16, 10), "a": coarse[:, ::2, ::2].reshape(3, 4, 10), "flat": np.ones((3, 16, 5))}
    )
    assert np.abs(colours["a"].astype(int) - colours["target"][:, ::2, ::2]).max() <= 1
    assert explained["flat"] == 0 and len(np.unique(colours["flat"])) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"images": IMAGES.astype(np.float32)}, "images is float32"),
        ({"masks": {"a": np.ones((3, 5), bool)}}, "no square grid"),
        ({"masks": {"a": np.ones((2, 4), bool)}}, "masks/a"),
        ({"features": {"a": np.full((3, 4, 2), np.nan)}}, "finite"),
        ({"features": {"a": features(0), "b": features(0, images=2)}}, "of 2 images"),
        ({"neighbours": Neighbours({"a": np.zeros((3, 1), int)}, {1: IMAGES[0]})}, "number 0"),
        ({"classes": Classes(["x"], np.array([0, 1]))}, "labels"),
        ({"classes": Classes(["x"], np.array([0]), [IMAGES[0]], [])}, "lost_labels"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        collect(tmp_path, **{"images": IMAGES, **wrong})
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_told(tmp_path):
    path = collect(tmp_path, IMAGES, masks={"a": np.ones((3, 4), bool)})
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], whole[:200] + b"xx" + whole[202:]):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_samples(path)
    np.savez(path, images=IMAGES, about=np.array('{"version": 99}'))
    with pytest.raises(ValueError, match="version 99"):
        read_samples(path)
    np.savez(path, images=IMAGES, about=np.array([{"version": 1}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        read_samples(path)


@pytest.mark.parametrize("shape", [(3, 0, 4, 3), (0, 4, 4, 3), (1, 1, 5000, 3)])
def test_images_that_cannot_be_shown_are_damage(tmp_path, shape):
    path = tmp_path / "report.npz"
    about = json.dumps({"version": 1, "explained": {}, "class_names": []})
    np.savez_compressed(path, images=np.zeros(shape, np.uint8), about=np.array(about))
    with pytest.raises(ValueError, match="images is uint8"):
        read_samples(path)


def test_flipped_bytes_raise_value_errors_alone(tmp_path):
    path = collect(tmp_path, IMAGES, masks={"a": np.ones((3, 4), bool)}, features={"a": features(0)})
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        try:
            read_samples(path)
        except ValueError:
            refused += 1
    assert refused > 200


def test_lost_images_are_spread_over_all():
    teacher, student = np.ones(100, bool), np.arange(100) % 2 == 0
    assert lost_by_student(teacher, student, limit=3).tolist() == [1, 49, 99]
    assert lost_by_student(torch.tensor([True, False]), torch.tensor([True, True])).tolist() == []


def test_facts_are_written_whole(tmp_path):
    written = write_facts(tmp_path, {"command": "comad"}).read_text()
    assert json.loads(written) == sealed({"command": "comad"}) and written.endswith("}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]


def test_changed_options_have_dotted_names():
    default = {"optim": {"epochs": 8, "lr": 0.1}, "data": "a", "betas": [1, 2]}
    config = {"optim": {"epochs": 2, "lr": 0.1}, "data": "a", "betas": [1, 3], "gate": {"power": 1}}
    expected = {"optim.epochs": [2, 8], "betas": [[1, 3], [1, 2]], "gate.power": [1, None]}
    assert changed_options(config, default) == expected
