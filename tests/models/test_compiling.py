import copy

import pytest
import torch

from comad.models.backbone import random_visible
from comad.models.compiling import compile_blocks, eager_mode, need_compiler
from comad.models.students import VitConfig


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"'no-such-compiler'; install one .* or leave --compile out"):
        need_compiler()


def test_a_compiler_is_found_by_the_environment(monkeypatch):
    monkeypatch.setenv("CXX", "ls")
    need_compiler()


@pytest.fixture
def compiled(monkeypatch):
    """A small network with compiled blocks, and the blocks' inputs that graphs were made for."""
    graphs = []

    def note(graph, inputs):
        graphs.append([tuple(part.shape) for part in inputs if part.ndim == 3])
        return graph.forward

    backbone = VitConfig(image_size=16, patch_size=4, width=12, depth=3, heads=2).build().eval()
    plain = copy.deepcopy(backbone)
    torch._dynamo.reset()
    compile_blocks(backbone)
    for block in backbone.blocks:
        block.compile(dynamic=False, backend=note)
    yield backbone, plain, graphs
    torch._dynamo.reset()


def test_blocks_are_compiled_once_per_shape_and_say_the_same(compiled):
    backbone, plain, graphs = compiled
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        for count in (4, 8, 4, 8):
            visible = random_visible(noise, count)
            torch.testing.assert_close(backbone(images, visible).patches, plain(images, visible).patches)
        assert graphs == [[(2, 5, 12)], [(2, 9, 12)]]
        with eager_mode(True):
            torch.testing.assert_close(backbone(images).patches, plain(images).patches)
    assert len(graphs) == 2


def test_copies_stay_plain(compiled):
    backbone, plain, _ = compiled
    assert all(block._compiled_call_impl is not None for block in backbone.blocks)
    assert all(block._compiled_call_impl is None for block in copy.deepcopy(backbone).blocks)
    assert list(backbone.state_dict()) == list(plain.state_dict())
