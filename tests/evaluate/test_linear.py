import pytest
import torch
from torch.nn import functional as F

from comad.evaluate.features import Features, FeatureSplits
from comad.evaluate.linear import LinearProbe

QUICK = LinearProbe(epochs=15, batch_size=64)


def draw(num_images, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(5, (num_images,), generator=generator)
    good = 3 + 50 * (centres[labels] + noise * torch.randn(num_images, 12, generator=generator))
    bad = torch.randn(num_images, 12, generator=generator)
    return Features({"bad": bad, "good": good}, {"fine": labels, "coarse": labels // 2}, torch.arange(num_images))


def splits(noise=0.1):
    return FeatureSplits(draw(200, 0, noise), draw(100, 1, noise), draw(100, 2, noise))


def test_separable_clusters_are_separated():
    result = QUICK(splits())
    assert result.pool == "good" and result.validation == 100
    assert result.top1 == {"fine": 100, "coarse": 100}
    assert result.correct["fine"].all() and result.correct["fine"].shape == (100,)


def test_test_labels_change_the_score_but_no_choice():
    features = splits(noise=1.5)
    labels = {name: y.roll(1) for name, y in features.test.labels.items()}
    one, two = QUICK(features), QUICK(features._replace(test=features.test._replace(labels=labels)))
    assert (one.settings, one.pool, one.validation) == (two.settings, two.pool, two.validation)
    assert one.top1["fine"] > two.top1["fine"]


def test_choice_is_the_best_setting_on_val():
    features = splits(noise=1.5)
    grid = QUICK.probe(features, "fine", "good")
    alone = [
        LinearProbe(learning_rates=(s[0],), weight_decays=(s[1],), epochs=15, batch_size=64).probe(
            features, "fine", "good"
        )
        for s in QUICK.settings
    ]
    accuracy = [probe.validation for probe in alone]
    assert grid.validation == max(accuracy)
    assert grid.setting == QUICK.settings[accuracy.index(max(accuracy))]


def test_same_as_torch_adamw():
    probe = LinearProbe(learning_rates=(0.01,), weight_decays=(0.5,), epochs=4, batch_size=32)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    found = probe.fit(x, y, 3)
    weight, bias = torch.zeros(6, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    order = torch.Generator().manual_seed(0)
    for _ in range(4):
        for batch in torch.randperm(64, generator=order).split(32):
            optimizer.zero_grad()
            F.cross_entropy(x[batch] @ weight + bias, y[batch]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(found.weight[0], weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.bias[0, 0], bias.detach(), rtol=1e-3, atol=1e-5)


def test_global_random_state_is_neither_read_nor_changed():
    features = splits(noise=1.5)
    torch.manual_seed(1)
    one = QUICK(features)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one.correct["fine"], QUICK(features).correct["fine"])


def test_sparse_and_unseen_labels():
    features = splits()
    spread = [part._replace(labels={"fine": part.labels["fine"] * 100}) for part in features]
    spread[0].labels["fine"][spread[0].labels["fine"] == 400] = -1  # class 400 is never seen in training
    result = QUICK(FeatureSplits(*spread))
    assert torch.equal(result.correct["fine"], spread[2].labels["fine"] != 400)


def test_no_labels_is_an_error_with_a_remedy():
    features = splits()
    with pytest.raises(ValueError, match="one folder per class"):
        QUICK(features._replace(train=features.train._replace(labels={})))
    with pytest.raises(ValueError, match="no fine label in test"):
        QUICK(features._replace(test=features.test._replace(labels={"fine": torch.full((100,), -1)})))
