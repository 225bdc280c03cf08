import numpy as np
import pytest
import timm
import torch
from timm.layers.drop import DropPath

from comad.evaluation.classifier import Classifier, cross_entropy, mix, mixed_labels, set_drop_path
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher, teacher_from_module

VIT = VitConfig(image_size=16, patch_size=4, width=12, depth=3, heads=2)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return VIT.build()


def scales(classifier, layer_decay=0.5):
    """Parameter name → (share of the learning rate, weight decay)."""
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    groups = classifier.parameter_groups(0.05, layer_decay)
    listed = [(names[id(p)], (g.get("lr_scale", 1.0), g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(listed) == len(dict(listed)) == len(names)
    return dict(listed)


def test_the_learning_rate_falls_by_layer(backbone):
    found = scales(Classifier(backbone, {"fine": 5}))
    assert found["heads.fine.weight"] == (1.0, 0.05) and found["heads.fine.bias"] == (1.0, 0.0)
    for block, share in enumerate((0.125, 0.25, 0.5)):
        assert found[f"backbone.vit.blocks.{block}.mlp.fc1.weight"] == (share, 0.05)
        assert found[f"backbone.vit.blocks.{block}.norm1.weight"] == (share, 0.0)
    assert found["backbone.vit.norm.weight"] == (0.5, 0.0)
    assert found["backbone.vit.patch_embed.proj.weight"] == (0.0625, 0.05)
    assert found["backbone.vit.cls_token"] == found["backbone.vit.pos_embed"] == (0.0625, 0.0)


def test_without_layer_decay_all_layers_learn_alike(backbone):
    assert {share for share, _ in scales(Classifier(backbone, {"fine": 5}), 1.0).values()} == {1.0}


def test_layers_of_a_convolutional_network_and_of_an_own_module():
    cnn = load_teacher("resnet18:random", 32).backbone
    found = scales(Classifier(cnn, {"fine": 2}))
    shares = [
        found[f"backbone.network.{name}"][0] for name in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.bn1.bias")
    ]
    assert shares == sorted(shares) and len(set(shares)) == 3 and shares[-1] == 0.5
    own = teacher_from_module("own", torch.nn.Conv2d(3, 8, 4, 4), 16).backbone
    assert {name: share for name, (share, _) in scales(Classifier(own, {"fine": 2})).items()} == {
        "heads.fine.weight": 1.0,
        "heads.fine.bias": 1.0,
        "backbone.network.module.weight": 0.5,
        "backbone.network.module.bias": 0.5,
    }


@pytest.mark.parametrize("spec", ["vit_tiny_patch16_224:random", "resnet18:random", "efficientnet_lite0:random"])
def test_a_frozen_backbone_learns_everywhere(spec):
    size = 32
    frozen = load_teacher(spec, size).backbone
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    classifier = Classifier(frozen, {"fine": 3, "coarse": 2})
    assert all(part.training for part in classifier.modules())
    scores = classifier(torch.rand(4, 3, size, size))
    assert {name: tuple(values.shape) for name, values in scores.items()} == {"fine": (4, 3), "coarse": (4, 2)}
    sum(values.square().sum() for values in scores.values()).backward()
    without = [name for name, p in classifier.named_parameters() if p.grad is None]
    assert without == []


def test_the_class_token_can_be_classified(backbone):
    images = torch.rand(2, 3, 16, 16)
    classifier = Classifier(backbone, {"fine": 3}, "cls").eval()
    expected = classifier.heads["fine"](backbone(images).cls)
    torch.testing.assert_close(classifier(images)["fine"], expected)
    backbone.token_types = ("patch",)
    with pytest.raises(ValueError, match="--pool patch"):
        Classifier(backbone, {"fine": 3}, "cls")


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("convnext_atto", 12), ("vit_tiny_patch16_224", 12)])
def test_stochastic_depth_rises_with_the_block(name, blocks):
    network = timm.create_model(name)
    assert set_drop_path(network, 0.2) == blocks
    rates = [part.drop_prob for part in network.modules() if isinstance(part, DropPath)]
    assert rates == sorted(rates) and rates[-1] == 0.2 and len(set(rates)) == blocks - 1
    assert network(torch.rand(2, 3, 224, 224)).shape == (2, 1000)
    set_drop_path(network, 0.0)
    assert not any(isinstance(part, DropPath) for part in network.modules())


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_the_images_are(mixup, cutmix):
    """An image of one colour per number: how much of each is in a mixture can be read off its pixels."""
    np.random.seed(3)
    images = torch.eye(4)[:, :3].view(4, 3, 1, 1).expand(4, 3, 16, 16).clone()
    for _ in range(5):
        mixed, shares = mix(images, mixup, cutmix)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), shares[:, :3])
        labels = mixed_labels(shares, torch.tensor([2, 0, 1, 1]), 3)
        torch.testing.assert_close(
            labels, torch.stack([shares[:, 1], shares[:, 2] + shares[:, 3], shares[:, 0]], dim=1)
        )
    assert torch.equal(images[0, 0], torch.ones(16, 16))


def test_without_mixing_labels_are_smooth_and_unlabelled_images_pull_nowhere():
    images, shares = mix(torch.rand(2, 3, 4, 4), 0.0, 0.0)
    assert torch.equal(shares, torch.eye(2)) and images.shape == (2, 3, 4, 4)
    targets = mixed_labels(shares, torch.tensor([1, -1]), 4, smoothing=0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.0, 0.0, 0.0, 0.0]]))
    scores = torch.randn(2, 4, requires_grad=True)
    loss = cross_entropy(scores, targets)
    reference = torch.nn.functional.cross_entropy(scores[:1], torch.tensor([1]), label_smoothing=0.2)
    torch.testing.assert_close(loss, reference)
    loss.backward()
    assert scores.grad is not None and torch.equal(scores.grad[1], torch.zeros(4))
    assert float(cross_entropy(scores.detach(), torch.zeros(2, 4))) == 0.0
