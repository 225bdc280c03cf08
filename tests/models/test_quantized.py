import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from comad.models.feature_map_backbone import FeatureMapBackbone, ModuleFeatures
from comad.models.quantized import QuantizedLinear, check_quantized, precision_of, quantize
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.06)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_8_bits_is_near_the_layer(kind, error, bias):
    if kind == "fp8" and torch.__version__ < "2.12":
        pytest.skip("this torch multiplies fp8 with a scale per row on GPUs alone")
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(4, 9, 64) * torch.logspace(-3, 3, 9).view(9, 1)
    with torch.no_grad():
        exact, found = layer(x), QuantizedLinear(layer, kind)(x)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    assert ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < error  # tokens of any size: each has its scale


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return VitConfig(image_size=16, patch_size=4, width=24, depth=2, heads=2).build().eval()


def test_a_network_keeps_its_tokens_its_size_and_its_flops(backbone):
    images = torch.rand(2, 3, 16, 16)
    numbers = []
    for _ in range(2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tokens = backbone(images).patches
        numbers.append((tokens, sum(p.numel() for p in backbone.parameters()), counter.get_total_flops()))
        quantize(backbone, "int8")
    (before, _, flops), (after, _, flops_in_8_bits) = numbers
    assert F.cosine_similarity(before, after, dim=-1).min() > 0.999 and not torch.equal(before, after)
    assert flops_in_8_bits == flops
    assert sum(p.numel() for p in backbone.vit.blocks[0].mlp.fc1.parameters()) == 24 * 96
    assert precision_of(backbone) == "int8"


def test_the_name_of_a_plain_precision():
    assert precision_of(load_teacher("vit_tiny_patch16_224:random", 32, torch.bfloat16).backbone) == "torch.bfloat16"


def test_a_network_without_blocks_is_refused():
    features = ModuleFeatures(nn.Conv2d(3, 4, 4, 4), 0, False, 16)
    with pytest.raises(ValueError, match="no blocks to put into int8; use --teacher-precision bf16"):
        quantize(FeatureMapBackbone(features, (0.5,) * 3, (0.5,) * 3, 16), "int8")


@pytest.mark.parametrize(
    ("kind", "compiled", "processor", "words"),
    [
        ("int8", False, "AVX512", "only with --compile; add it"),
        ("int8", True, "AVX2", "is for CPUs with AVX-512; leave it out"),
        ("fp8", True, "AVX512", "needs a GPU such as H100 or L4; leave it out"),
    ],
)
def test_where_8_bits_are_not_faster(monkeypatch, kind, compiled, processor, words):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    with pytest.raises(ValueError, match=words):
        check_quantized(kind, torch.device("cpu"), compiled)
    check_quantized("int8", torch.device("cpu"), True) if processor == "AVX512" else None
