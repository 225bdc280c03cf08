import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from comad.models.packed import CAN_PACK, PackedLinear, pack
from comad.models.timm_backbone import VitConfig
from comad.models.whole_backbone import ModuleFeatures, WholeBackbone

needs_onednn = pytest.mark.skipif(not CAN_PACK, reason="this CPU or this torch has no packed bf16 products")


def network(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return VitConfig(image_size=16, patch_size=4, width=24, depth=2, heads=2).build().eval().to(dtype)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (5, 33), (1, 1)])
def test_a_packed_layer_gives_the_same_bits(bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 56, bias=bias).bfloat16(), torch.randn(*shape, 40).bfloat16()
    with torch.no_grad():
        assert torch.equal(PackedLinear(layer)(x), layer(x))


@needs_onednn
@torch.no_grad()
def test_a_packed_network_keeps_its_tokens_its_size_and_its_flops():
    plain, packed, images = network(), network(), torch.rand(3, 3, 16, 16)
    visible = torch.arange(9).expand(3, -1)
    pack(packed)
    assert sum(isinstance(part, PackedLinear) for part in packed.modules()) == 8
    found = []
    for backbone in (plain, packed):
        with FlopCounterMode(display=False) as counter:
            cls, patches = backbone(images, visible)
        found.append((cls, patches, counter.get_total_flops(), sum(p.numel() for p in backbone.parameters())))
    (cls, patches, *sizes), (packed_cls, packed_patches, *packed_sizes) = found
    assert torch.equal(cls, packed_cls) and torch.equal(patches, packed_patches)
    assert sizes == packed_sizes


@pytest.mark.parametrize("backbone", [network(torch.float32), network().to("meta")], ids=["fp32", "other device"])
def test_what_would_not_be_faster_stays(backbone):
    pack(backbone)
    assert not any(isinstance(part, PackedLinear) for part in backbone.modules())


def test_a_network_without_blocks_stays():
    features = ModuleFeatures(nn.Conv2d(3, 4, 4, 4), 0, False, 16)
    backbone = WholeBackbone(features, (0.5,) * 3, (0.5,) * 3, 16).bfloat16()
    pack(backbone)
    assert not any(isinstance(part, PackedLinear) for part in backbone.modules())
