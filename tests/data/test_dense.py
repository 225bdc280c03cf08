import pytest
import torch

from comad.data.ade20k import IGNORED, load_ade20k
from comad.data.coco import load_coco
from comad.data.dense import (
    GREY,
    DenseDataset,
    DenseImages,
    DetectionView,
    SegmentationView,
    collate,
    in_order,
    targets_of,
)
from comad.data.images import UnreadableImageError


def two_halves(height=40, width=60):
    """Left half of class 3 and red, right half of class 5 and blue."""
    image, classes = torch.zeros(3, height, width, dtype=torch.uint8), torch.full((height, width), 3, dtype=torch.uint8)
    image[0, :, : width // 2] = image[2, :, width // 2 :] = 255
    classes[:, width // 2 :] = 5
    return image, classes


def test_label_maps_move_with_the_image(monkeypatch):
    monkeypatch.setattr("comad.data.dense.v2.RandomPhotometricDistort", lambda p: lambda image: image)
    view = SegmentationView(crop=32, short_side=40)
    for seed in range(12):
        torch.manual_seed(seed)
        image, classes = view(*two_halves())
        assert image.shape == (3, 32, 32) and classes.shape == (32, 32)
        assert set(classes.unique().tolist()) <= {3, 5, IGNORED}
        red, blue = image[0].float() > 200, image[2].float() > 200
        sure = (red != blue) & (classes != IGNORED)
        assert (classes[red & sure] == 3).float().mean() > 0.9 and (classes[blue & sure] == 5).float().mean() > 0.9
        filled = classes == IGNORED
        assert (image.permute(1, 2, 0)[filled] == torch.tensor(GREY).to(torch.uint8)).all()


def test_crops_with_one_class_alone_are_avoided():
    classes = torch.full((40, 400), 3, dtype=torch.uint8)
    classes[:, 190:210] = 5
    view, mixed = SegmentationView(crop=40, short_side=40, scale=(1.0, 1.0), largest_share=0.9), 0
    for seed in range(20):
        torch.manual_seed(seed)
        mixed += len(view(torch.zeros(3, 40, 400, dtype=torch.uint8), classes)[1].unique()) > 1
    assert mixed >= 10  # by chance 3


def test_a_crop_without_labels_is_not_taken_while_another_has_some():
    classes = torch.full((60, 60), IGNORED, dtype=torch.uint8)
    classes[:15, :15] = 3  # the only object: no crop has a second class
    view, labelled = SegmentationView(crop=30, short_side=60, scale=(1.0, 1.0)), 0
    for seed in range(20):
        torch.manual_seed(seed)
        labelled += bool((view(torch.zeros(3, 60, 60, dtype=torch.uint8), classes)[1] == 3).any())
    assert labelled >= 18  # a single try: 5


@pytest.mark.parametrize("scale", [(0.4, 0.4), (1.0, 1.0), (2.0, 2.0)])
def test_masks_and_boxes_move_with_the_image(scale):
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    masks = (image[:1] > 0).to(torch.uint8)
    seen = 0
    for seed in range(8):
        torch.manual_seed(seed)
        view, target = DetectionView(size=48, scale=scale)(image, (masks, torch.tensor([7])))
        assert view.shape == (3, 48, 48)
        for box, label, mask in zip(*(target[name] for name in ("boxes", "labels", "masks")), strict=True):
            left, top, right, bottom = box.int().tolist()
            assert label == 7 and mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[:, left].any() and mask[top].any() and mask[:, right - 1].any() and mask[bottom - 1].any()
            white = view[0] > 128
            assert (white[mask.bool()].float().mean() > 0.8) and (mask.bool() & white).sum() > 0.8 * white.sum() * 0.8
            seen += 1
    assert seen


def test_objects_that_leave_the_view_are_dropped():
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[1, 2:4, 3:7] = 1
    target = targets_of(masks, torch.tensor([4, 5, 6]))
    assert target["boxes"].tolist() == [[3, 2, 7, 4]] and target["labels"].tolist() == [5]
    assert target["masks"].shape == (1, 8, 8)
    empty = targets_of(masks[:0], torch.zeros(0, dtype=torch.int64))
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 8, 8)


def test_samples_depend_on_seed_view_and_image_alone(dense_folder):
    data = DenseDataset(load_coco(str(dense_folder)).train, DetectionView(size=32), seed=3)
    torch.manual_seed(0)
    first = data[(1, 2)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = data[(1, 2)], data[(2, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert torch.equal(first.targets["boxes"], again.targets["boxes"])


def test_batches_stack_label_maps_and_list_objects(dense_folder):
    view = SegmentationView(crop=32, short_side=32)
    maps = DenseDataset(load_ade20k(str(dense_folder)).train, view, 0)
    batch = collate([maps[(0, 0)], maps[(0, 1)]])
    assert batch.images.shape == (2, 3, 32, 32) and batch.targets.shape == (2, 32, 32)
    objects = DenseDataset(load_coco(str(dense_folder)).train, DetectionView(size=32), 0)
    batch = collate([objects[(0, index)] for index in range(8)])
    assert batch.images.shape == (8, 3, 32, 32) and len(batch.targets) == 8 and batch.readable.all()


class Broken(DenseImages):
    """Every second image is unreadable; with ``all`` every one."""

    def __init__(self, every=2):
        self.every = every

    def __len__(self):
        return 6

    def path(self, index):
        return f"image {index}"

    labels, key, content_numbers = {}, path, None

    def load(self, index):
        if index % self.every == 0:
            raise UnreadableImageError(f"{self.path(index)}: no")
        return torch.full((3, 4, 4), index, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)


def test_the_next_readable_image_stands_in():
    data = DenseDataset(Broken(), lambda image, target: (image, target), 0)
    sample = data[(0, 2)]
    assert sample.image == 2 and not sample.readable and sample.images.max() == 3
    assert data[(0, 3)].readable
    with pytest.raises(ValueError, match="in a row cannot be used; the first: image 4: no"):
        DenseDataset(Broken(1), lambda image, target: (image, target), 0)[(0, 4)]


def test_images_come_in_order():
    assert list(in_order(lambda index: index * index, 5)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("shape", [(2, 20_000), (20_000, 2)])
def test_a_piece_of_a_thin_image_is_taken_before_it_is_resized(shape):
    classes = torch.arange(20_000).remainder(200).to(torch.uint8).expand(2, -1).view(2, -1)
    classes = classes if shape[0] == 2 else classes.T
    image = classes.expand(3, -1, -1)
    view = SegmentationView(crop=64, short_side=64)
    starts = set()
    for seed in range(6):
        torch.manual_seed(seed)
        pixels, labels = view(image, classes)
        assert pixels.shape == (3, 64, 64) and labels.shape == (64, 64)
        starts.add(int(labels[0, 0]))
    assert len(starts) > 2
