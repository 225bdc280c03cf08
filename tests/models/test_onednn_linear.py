import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from comad.models.feature_map_backbone import FeatureMapBackbone, ModuleFeatures
from comad.models.onednn_linear import HAS_ONEDNN_LINEAR, OnednnLinear, use_onednn_linear
from comad.models.quantized import precision_of
from comad.models.students import VitConfig

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN_LINEAR, reason="this CPU or this torch has no packed bf16 products")


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
        assert torch.equal(OnednnLinear(layer)(x), layer(x))


@needs_onednn
@torch.no_grad()
def test_gelu_sees_sums_that_are_not_rounded():
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 56).bfloat16(), torch.randn(64, 40).bfloat16()
    packed = OnednnLinear(layer)
    packed.gelu = True
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    assert (packed(x) - exact).norm() < 0.8 * (F.gelu(layer(x)) - exact).norm()


@needs_onednn
@torch.no_grad()
def test_a_packed_network_is_as_near_to_fp32_and_keeps_its_size_and_its_flops():
    plain, packed, images = network(), network(), torch.rand(3, 3, 16, 16)
    exact, visible = network().float()(images, torch.arange(9).expand(3, -1)), torch.arange(9).expand(3, -1)
    use_onednn_linear(packed)
    assert sum(isinstance(part, OnednnLinear) for part in packed.modules()) == 8
    found = []
    for backbone in (plain, packed):
        with FlopCounterMode(display=False) as counter:
            patches = backbone(images, visible).patches
        error = float((patches.float() - exact.patches).norm() / exact.patches.norm())
        found.append((counter.get_total_flops(), sum(p.numel() for p in backbone.parameters()), error))
    (*sizes, error), (*packed_sizes, packed_error) = found
    assert sizes == packed_sizes
    assert packed_error == pytest.approx(error, rel=0.05) and error < 0.01
    assert (precision_of(plain), precision_of(packed)) == ("torch.bfloat16", "packed bf16")


@needs_onednn
@torch.no_grad()
def test_other_activations_stay_and_products_give_the_same_bits():
    backbone = network()
    for block in backbone.vit.blocks:
        block.mlp.act = nn.GELU("tanh")
    images = torch.rand(2, 3, 16, 16)
    before = backbone(images).patches
    use_onednn_linear(backbone)
    assert torch.equal(backbone(images).patches, before)


@pytest.mark.parametrize("backbone", [network(torch.float32), network().to("meta")], ids=["fp32", "other device"])
def test_what_would_not_be_faster_stays(backbone):
    use_onednn_linear(backbone)
    assert not any(isinstance(part, OnednnLinear) for part in backbone.modules())


def test_a_network_without_blocks_stays():
    features = ModuleFeatures(nn.Conv2d(3, 4, 4, 4), 0, False, 16)
    backbone = FeatureMapBackbone(features, (0.5,) * 3, (0.5,) * 3, 16).bfloat16()
    use_onednn_linear(backbone)
    assert not any(isinstance(part, OnednnLinear) for part in backbone.modules())
