from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from comad.evaluation import linear
from comad.evaluation.features import Features, FeatureSplits
from comad.evaluation.linear import LinearProbe, Setting

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
    scores, choices = QUICK(splits())
    assert choices == {"pool_linear": "good", "validation_linear": 100}
    assert {name: found.percent for name, found in scores.items()} == {"linear": 100, "linear_coarse": 100}
    assert scores["linear"].correct.all() and scores["linear"].correct.shape == (100,)


def test_test_labels_change_the_score_but_no_choice():
    features = splits(noise=1.5)
    labels = {name: y.roll(1) for name, y in features.test.labels.items()}
    one, two = QUICK(features), QUICK(features._replace(test=features.test._replace(labels=labels)))
    assert one.choices == two.choices
    assert one.scores["linear"].percent > two.scores["linear"].percent


def test_choice_is_the_best_setting_on_val():
    features = splits(noise=1.5)
    pool, grid = QUICK.best(features, "fine", ("bad", "good"))
    alone = [QUICK.probe(features, "fine", "good", (setting,), QUICK.num_steps(200)) for setting in QUICK.settings]
    accuracy = [probe.validation for probe in alone]
    assert pool == "good" and grid.validation == max(accuracy)
    assert grid.setting == QUICK.settings[accuracy.index(max(accuracy))]
    assert [accuracy[QUICK.settings.index(setting)] for setting in grid.ranking] == sorted(accuracy, reverse=True)


def test_many_steps_are_spent_on_the_settings_that_a_short_schedule_likes():
    features, full = splits(noise=1.5), QUICK.num_steps(200)
    trial = QUICK.probe(features, "fine", "good", QUICK.settings, 10)
    _, found = replace(QUICK, direct_steps=10, trial_steps=10, kept=2, precision="fp32").best(
        features, "fine", ("bad", "good")
    )
    assert set(found.ranking) == set(trial.ranking[:2]) and full > 10
    assert found.validation == QUICK.probe(features, "fine", "good", trial.ranking[:2], full).validation
    assert replace(QUICK, max_steps=7).num_steps(10**9) == 7


def run_adamw(x, y, num_classes):
    """Four epochs of torch's own, on two parameters."""
    weight, bias = torch.zeros(6, num_classes, requires_grad=True), torch.zeros(num_classes, requires_grad=True)
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
    return weight.detach().T, bias.detach()


def test_each_setting_is_trained_as_it_would_be_alone():
    probe = LinearProbe(batch_size=32)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    found = probe.fit(x, y, (Setting(0.2, 0.0), Setting(0.01, 0.5)), 8)
    weight, bias = run_adamw((x - x.mean(dim=0)) / x.std(dim=0, correction=0), y, 3)
    torch.testing.assert_close(found.weights[1].detach(), weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.biases[1].detach(), bias, rtol=1e-3, atol=1e-5)


def test_same_optimum_as_scikit_learn():
    """Without weight decay, on classes that overlap, the optimum of logistic regression is one point."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = splits(noise=6)
    x, y = features.train.pools["good"], features.train.labels["fine"]
    found = LinearProbe(batch_size=200).fit(x, y, (Setting(0.05, 0.0),), 3000)
    rows, unseen = (
        ((part - x.mean(dim=0)) / x.std(dim=0, correction=0)).double() for part in (x, features.test.pools["good"])
    )
    theirs = linear_model.LogisticRegression(C=1e9, tol=1e-8, max_iter=5000).fit(rows.numpy(), y.numpy())
    expected = torch.from_numpy(theirs.predict_proba(unseen.numpy()))
    ours = found(features.test.pools["good"])[:, 0].softmax(dim=1).detach().double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)


def test_products_in_bf16_give_nearly_the_same_score():
    features = splits(noise=1.5)
    half, full = replace(QUICK, precision="bf16")(features), QUICK(features)
    assert abs(half.scores["linear"].percent - full.scores["linear"].percent) <= 3


def test_global_random_state_is_neither_read_nor_changed():
    features = splits(noise=1.5)
    torch.manual_seed(1)
    one = QUICK(features)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one.scores["linear"].correct, QUICK(features).scores["linear"].correct)


def test_sparse_and_unseen_labels():
    features = splits()
    spread = [part._replace(labels={"fine": part.labels["fine"] * 100}) for part in features]
    spread[0].labels["fine"][spread[0].labels["fine"] == 400] = -1  # class 400 is never seen in training
    scores, _ = QUICK(FeatureSplits(*spread))
    assert torch.equal(scores["linear"].correct, spread[2].labels["fine"] != 400)


def test_no_labels_is_an_error_with_a_remedy():
    features = splits()
    with pytest.raises(ValueError, match="one folder per class"):
        QUICK(features._replace(train=features.train._replace(labels={})))
    with pytest.raises(ValueError, match="no fine label in test"):
        QUICK(features._replace(test=features.test._replace(labels={"fine": torch.full((100,), -1)})))


def test_products_are_in_bf16_only_after_a_choice_among_many(monkeypatch):
    asked = []

    def fit(self, *arguments, real=LinearProbe.fit):
        asked.append(arguments[-1])
        return real(self, *arguments[:-1])

    monkeypatch.setattr(LinearProbe, "fit", fit)
    monkeypatch.setattr(linear, "has_bf16", lambda device: True)
    QUICK(splits())
    assert not any(asked)
    replace(QUICK, direct_steps=1, trial_steps=2).best(splits(), "fine", ("good",))
    assert asked[-2:] == [True, True]
