import numpy as np
import pytest
import torch
from PIL import Image

from comad.data.images import FolderImages, ImageSet, Splits
from comad.data.loader import evaluation_batches
from comad.evaluate.features import (
    View,
    evaluating,
    extract_features,
    extract_many,
    labelled_indices,
    pixel_features,
    split_features,
)
from comad.models.timm_backbone import TimmBackbone, create_vit

SIZE = 16


class Painted(ImageSet):
    """Random pictures in memory."""

    eval_crop = 1.0

    def __init__(self, num_images, labels):
        self.name = "painted"
        self.labels = labels
        self.groups = torch.arange(num_images) // 2
        self.pixels = torch.randint(256, (num_images, 3, 20, 20), generator=torch.Generator().manual_seed(0)).byte()

    def __len__(self):
        return len(self.pixels)

    def load(self, index, min_side=0):
        return self.pixels[index]

    def path(self, index):
        return f"painted/{index}"


@pytest.fixture
def images():
    return Painted(7, {"fine": torch.tensor([0, -1, 1, -1, 1, 0, -1]), "coarse": torch.tensor([0, 0, 0, -1, 0, 0, -1])})


def build(token_types=("cls", "patch")):
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    return TimmBackbone(vit, token_types=token_types)


def test_pools_are_the_class_token_and_the_mean_patch(images):
    backbone = build().eval()
    features = extract_features(backbone, images, SIZE, batch_size=3)
    with torch.no_grad():
        tokens = backbone(torch.cat(list(evaluation_batches(images, SIZE))))
    torch.testing.assert_close(features["cls"], tokens.cls)
    torch.testing.assert_close(features["patch"], tokens.patches.mean(dim=1))
    assert not features["cls"].is_inference()


def test_class_token_without_meaning_is_no_pool(images):
    assert list(extract_features(build(("patch",)), images, SIZE)) == ["patch"]


def test_indices_choose_and_order_the_images(images):
    backbone, indices = build(), torch.tensor([5, 0])
    whole = extract_features(backbone, images, SIZE)
    torch.testing.assert_close(extract_features(backbone, images, SIZE, indices=indices)["cls"], whole["cls"][indices])
    assert extract_features(backbone, images, SIZE, indices=indices[:0])["cls"].shape == (0, 24)


def test_bfloat16_is_close_and_comes_back_as_float32(images):
    backbone = build()
    full, half = (extract_features(backbone, images, SIZE, dtype)["cls"] for dtype in (None, torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.1


def test_modes_of_all_parts_are_restored():
    backbone = build().train()
    backbone.vit.norm.eval()
    with pytest.raises(KeyError), evaluating(backbone):
        assert not any(part.training for part in backbone.modules())
        raise KeyError
    assert backbone.training and backbone.vit.blocks[0].training and not backbone.vit.norm.training


def test_pixels_are_small_flat_images(images):
    features = pixel_features(images, size=4)
    assert features["pixels"].shape == (7, 48)
    assert features["pixels"].abs().max() <= 1
    torch.testing.assert_close(features["pixels"].mean(dim=1), torch.zeros(7))


@pytest.mark.parametrize("networked", [True, False])
def test_only_labelled_images_are_encoded(images, networked):
    assert labelled_indices(images).tolist() == [0, 1, 2, 4, 5]
    splits = Splits(images, images, images, {}, "none")
    (features,) = split_features([View(build() if networked else None, SIZE)], splits)
    assert all(len(rows) == 5 for rows in features.train.pools.values())
    assert features.train.labels["fine"].tolist() == [0, -1, 1, 1, 0]
    assert features.test.groups.tolist() == [0, 0, 1, 2, 2]
    rows, labels = features.val.labelled("fine", next(iter(features.val.pools)))
    assert len(rows) == len(labels) == 4
    assert features.label_sets == ("fine", "coarse")


def test_a_view_is_the_same_alone_and_beside_others(tmp_path):
    """JPEG files can be shrunk while they are decoded, to no less than the smallest view needs."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((2700, 2100)).save(tmp_path / "a.jpg")
    images = FolderImages("x", tmp_path, ["a.jpg"], None)
    views = [View(None, size) for size in (16, 32, 448)]
    together = extract_many(views, images)
    for view, found in zip(views, together, strict=True):
        assert torch.equal(found["pixels"], extract_many([view], images)[0]["pixels"])


def test_all_that_is_labelled_is_no_copy(images):
    (features, *_) = split_features([View(None, 4)], Splits(*[images] * 3, {}, "none"))
    features.train.labels["fine"].clamp_(min=0)
    assert features.train.labelled("fine", "pixels")[0] is features.train.pools["pixels"]
