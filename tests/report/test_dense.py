import json

import numpy as np
import pytest
from PIL import Image

from comad.report.dense import draw_detection, draw_segmentation


@pytest.fixture
def run(tmp_path):
    lines = [{"step": step, "loss": 1 / step, "lr": 0.1, "miou": step, "box_ap": step} for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def save(**arrays):
        np.savez(tmp_path / "samples.npz", names=np.array(["cat", "dog"]), **arrays)
        return tmp_path

    return save


def noise_image(height=20, width=30):
    return np.random.default_rng(0).integers(0, 255, (3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 3])
def test_segmentation_sheets(run, count):
    maps = {f"truth{n}": np.full((20, 30), 255 if n else 1, dtype=np.uint8) for n in range(count)}
    answers = {f"answer{n}": np.zeros((20, 30), dtype=np.uint8) for n in range(count)}
    folder = run(**{f"image{n}": noise_image() for n in range(count)}, **maps, **answers)
    paths = draw_segmentation(folder)
    assert [path.name for path in paths] == ["predictions.png", "curves.png"]
    assert all(min(Image.open(path).size) > 100 for path in paths)


def test_detection_sheets_with_and_without_objects(run):
    mask = np.zeros((1, 20, 30), dtype=bool)
    mask[0, 3:9, 4:20] = True
    folder = run(
        image0=noise_image(),
        truth_masks0=mask,
        truth_labels0=np.array([2]),
        answer_boxes0=np.array([[4.0, 3.0, 20.0, 9.0]]),
        answer_labels0=np.array([1]),
        answer_scores0=np.array([0.9]),
        answer_masks0=mask,
        image1=noise_image(),
        truth_masks1=mask[:0],
        truth_labels1=np.array([], dtype=np.int64),
        answer_boxes1=np.zeros((0, 4)),
        answer_labels1=np.array([], dtype=np.int64),
        answer_scores1=np.array([]),
        answer_masks1=mask[:0],
    )
    assert all(min(Image.open(path).size) > 100 for path in draw_detection(folder))
