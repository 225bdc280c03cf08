import pytest
import torch
from timm.layers.drop import DropPath
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from comad.models.maps import FeatureMaps, load_maps
from comad.models.pyramid import STRIDES, FourScales, SimplePyramid, conv_norm
from comad.models.teachers import load_teacher, teacher_from_module
from comad.models.windows import WindowBlock, use_windows

SIZE = 64
KINDS = {
    "vit_tiny_patch16_224:random": [16, 16, 16, 16],
    "vit_small_patch14_dinov2:random": [16, 16, 16, 16],  # images are resized to 14 pixels a patch
    "resnet18:random": [4, 8, 16, 32],
    "mae-stamps": [8, 8, 8, 8],
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    maps, _ = load_maps(request.param, SIZE)
    return maps, KINDS[request.param]


def test_every_kind_gives_four_maps_of_its_strides(kind):
    maps, strides = kind
    found = maps(torch.rand(2, 3, SIZE, SIZE))
    assert maps.strides == strides
    assert [part.shape for part in found] == [
        (2, width, SIZE // stride, SIZE // stride) for width, stride in zip(maps.widths, strides, strict=True)
    ]


def test_necks_bring_every_kind_to_the_same_strides(kind):
    maps, _ = kind
    sizes = [
        (1, width, SIZE // stride, SIZE // stride) for width, stride in zip(maps.widths, maps.strides, strict=True)
    ]
    found = [torch.rand(size) for size in sizes]
    four = FourScales(maps.widths, maps.strides)(found)
    assert [part.shape[2] for part in four] == [SIZE // stride for stride in STRIDES]
    levels = SimplePyramid(maps.widths, maps.strides, 16)(found)
    assert [level.shape for level in levels.values()] == [
        (1, 16, SIZE // stride, SIZE // stride) for stride in (*STRIDES, 64)
    ]


def test_loaded_networks_are_trainable_down_to_the_first_layer(teacher_specs):
    maps, card = load_maps(teacher_specs[0], 32)
    assert maps.training and card.name == "first"
    sum(part.square().mean() for part in maps(torch.rand(1, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in maps.parameters())
    assert maps.network.patch_embed.proj.weight.grad.abs().sum() > 0


def test_a_frozen_network_stays_in_eval_mode_without_gradients(teacher_specs):
    maps, _ = load_maps(teacher_specs[0], 32, frozen=True)
    outer = nn.Sequential(maps).train()
    assert not any(part.training for part in maps.modules()) and outer.training
    assert not any(parameter.requires_grad for parameter in maps.parameters())
    assert not maps(torch.rand(1, 3, 32, 32))[0].requires_grad


def test_the_last_map_is_what_the_backbone_gives(teacher_specs):
    images = torch.rand(2, 3, 32, 32)
    backbone = load_teacher(teacher_specs[0], 32).backbone
    maps, _ = load_maps(teacher_specs[0], 32, frozen=True)
    expected = backbone(images).patches.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    assert torch.allclose(maps(images)[-1], expected, atol=1e-5)


def test_layers_decay_towards_the_stem(teacher_specs):
    module = nn.Module()
    module.maps, _ = load_maps(teacher_specs[0], 32)
    module.head = nn.Linear(2, 2)
    module.group_matcher = lambda coarse=False: module.maps.group_matcher("maps.")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    scale = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(module, 0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert len(scale) == len(names) and scale["head.weight"] == 1
    assert scale["maps.network.blocks.1.mlp.fc1.weight"] == scale["maps.network.norm.weight"] == 0.5
    assert scale["maps.network.blocks.0.mlp.fc1.weight"] == 0.25
    assert scale["maps.network.patch_embed.proj.weight"] == scale["maps.network.pos_embed"] == 0.125


def test_stochastic_depth_rises_and_needs_blocks(teacher_specs):
    maps, _ = load_maps(teacher_specs[0], 32, drop_path=0.2)
    rates = [part.drop_prob for part in maps.modules() if isinstance(part, DropPath)]
    assert rates == [0.0, 0.0, 0.2, 0.2]
    with pytest.raises(ValueError, match="--drop-path 0"):
        load_maps("resnet18:random", 32, drop_path=0.1)


def test_sizes_and_modules_that_do_not_fit_are_refused(teacher_specs):
    with pytest.raises(ValueError, match="30 pixels are no multiple of 4, the side of a patch; use 32"):
        load_maps(teacher_specs[0], 30)
    own = teacher_from_module("own", nn.Conv2d(3, 5, 8, 8), 32)
    with pytest.raises(ValueError, match="no maps of inner blocks"):
        FeatureMaps(own.backbone, 32)


def test_group_norm_works_on_one_image_and_one_cell():
    layer = conv_norm(4, 32, 1)
    found = layer(torch.rand(1, 4, 1, 1))
    assert found.shape == (1, 32, 1, 1) and found.abs().sum() > 0
    both = torch.rand(2, 4, 3, 3)
    assert torch.allclose(layer(both)[:1], layer(both[:1]), atol=1e-6)  # an image does not depend on its neighbours


class Shift(nn.Module):
    """Adds the mean of all tokens it sees to each."""

    def forward(self, tokens):
        return tokens + tokens.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)])
def test_a_window_sees_its_patches_and_the_prefix(grid):
    rows, columns = grid
    tokens = torch.rand(2, 1 + rows * columns, 3)
    found = WindowBlock(Shift(), grid, 2, 1)(tokens)
    assert found.shape == tokens.shape
    prefix, patches = tokens[:, 0], tokens[:, 1:].unflatten(1, grid)
    filled = torch.zeros(2, 6, 6, 3)
    filled[:, :rows, :columns] = patches
    first = (filled[:, :2, :2].sum(dim=(1, 2)) + prefix) / 5
    assert torch.allclose(found[:, 1], patches[:, 0, 0] + first, atol=1e-6)
    corners = [(y, x) for y in range(0, rows, 2) for x in range(0, columns, 2)]
    means = [(filled[:, y : y + 2, x : x + 2].sum(dim=(1, 2)) + prefix) / 5 for y, x in corners]
    assert torch.allclose(found[:, 0], prefix + torch.stack(means).mean(dim=0), atol=1e-6)


def test_a_window_as_large_as_the_grid_changes_nothing(teacher_specs):
    images = torch.rand(1, 3, 32, 32)
    plain, _ = load_maps(teacher_specs[0], 32, frozen=True)
    windowed, _ = load_maps(teacher_specs[0], 32, frozen=True)
    use_windows(windowed.network, 8, num_global=1)
    assert isinstance(windowed.network.blocks[0], WindowBlock)
    assert not isinstance(windowed.network.blocks[1], WindowBlock)
    for one, other in zip(plain(images), windowed.eval()(images), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="leave out --window"):
        load_maps("resnet18:random", 32, window=2)
