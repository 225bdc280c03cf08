import csv
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from comad.data.bundled import SIDE, STAMPS, _premultiplied, load_stamps
from comad.data.load import load_images
from comad.data.transforms import evaluation_view


@pytest.fixture(scope="module")
def stamps():
    return load_stamps()


@pytest.fixture(scope="module")
def rows():
    with (STAMPS / "labels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_bundled_set_is_found_by_its_name(stamps):
    assert [len(part) for part in load_images("stamps")[:3]] == [7573, 1095, 2167]
    assert [len(stamps.class_names[level]) for level in ("fine", "coarse")] == [37, 9]


def test_no_concept_is_in_two_splits(stamps):
    concepts = [set(part.groups.tolist()) for part in stamps[:3]]
    assert not (concepts[0] & concepts[1] or concepts[0] & concepts[2] or concepts[1] & concepts[2])


def test_no_file_is_in_two_splits(stamps):
    assert len({name for part in stamps[:3] for name in part.files}) == 7573 + 1095 + 2167


def test_labels_are_those_of_the_table(stamps, rows):
    table = {row["file"]: row for row in rows}
    for part in stamps[:3]:
        for index in range(0, len(part), 97):
            row = table[part.files[index]]
            for level, column in (("fine", "label"), ("coarse", "coarse")):
                number = int(part.labels[level][index])
                assert (stamps.class_names[level][number] if number >= 0 else "") == row[column]


def test_colours_are_premultiplied(stamps):
    translucent = 0
    for index in range(0, 400, 4):
        image = stamps.train.load(index)
        assert image.shape == (4, SIDE, SIDE) and image.dtype == torch.uint8
        assert bool((image[:3] <= image[3:]).all())
        translucent += int(((image[3] > 0) & (image[3] < 255)).sum())
    assert translucent


def test_premultiplication_and_padding_against_numpy():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (60, 80, 4), dtype=np.uint8)
    found = _premultiplied(Image.fromarray(pixels, "RGBA")).astype(float)
    expected = np.zeros((4, SIDE, SIDE))
    centre = expected[:, 18:78, 8:88]
    centre[3] = pixels[..., 3]
    centre[:3] = pixels[..., :3].transpose(2, 0, 1) * (pixels[..., 3] / 255)
    assert np.abs(found - expected).max() <= 1


def test_the_evaluation_view_is_on_white(stamps):
    image = stamps.train.load(0).clone()
    image[:, :, :20] = 0
    view = evaluation_view(image, SIDE, stamps.train.eval_crop)
    assert view.shape == (3, SIDE, SIDE)
    assert bool((view[:, :, :20] == 255).all())
    opaque = image[3] == 255
    assert torch.equal(view[:, opaque], image[:3, opaque])


def test_the_whole_stamp_is_shown(stamps):
    assert all(part.eval_crop == 1.0 for part in stamps[:3])


def test_an_image_is_decoded_once_and_pickling_leaves_pixels_behind(stamps, monkeypatch):
    first = stamps.val.load(3).clone()
    copied = pickle.loads(pickle.dumps(stamps.val))
    assert torch.equal(copied.load(3), first)
    assert len(pickle.dumps(stamps.val)) < 200_000
    monkeypatch.setattr(stamps.val, "_read", lambda index: pytest.fail("decoded again"))
    assert torch.equal(stamps.val.load(3), first)


def test_a_forked_worker_decodes_into_shared_memory():
    val = load_stamps().val
    val.load(0)  # the archive is open in the parent too

    def decoded_sum(indices: list[int]) -> torch.Tensor:
        return val.load(indices[0]).sum()

    sums = list(DataLoader([7], batch_size=1, num_workers=1, collate_fn=decoded_sum, timeout=60))
    assert bool(val._decoded[7])
    assert torch.equal(val._pixels[7], load_stamps().val.load(7))
    assert sums == [val._pixels[7].sum()]


def test_notice_and_licence(stamps):
    assert "CC BY 4.0" in stamps.licence
