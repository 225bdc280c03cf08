import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comad.data import loader as loader_module
from comad.data.load import load_images
from comad.data.loader import (
    EpochBatches,
    LoaderConfig,
    ViewDataset,
    evaluation_batches,
    training_batches,
)
from comad.data.transforms import ColourChange, Crop


class Views:
    def __call__(self, image):
        return (ColourChange()(Crop(size=8)(image)),), torch.rand(2, 3)


@pytest.fixture
def folder(tmp_path, write_images):
    return write_images(tmp_path, [f"train/{i}.png" for i in range(9)] + ["val/1.png", "test/1.png"], size=12)


@pytest.fixture
def train(folder):
    return load_images(str(folder)).train


def read(images, order, workers=0, seed=3):
    dataset = ViewDataset(images, Views(), seed, 8)
    return list(training_batches(dataset, order, LoaderConfig(workers=workers)))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.data())
def test_epoch_batches(num_images, batch_size, seed, fixed_views, data):
    batch_size = min(batch_size, num_images)
    per_epoch = num_images // batch_size
    whole = list(EpochBatches(num_images, batch_size, seed, (0, 3 * per_epoch), fixed_views=fixed_views))
    assert len(whole) == 3 * per_epoch
    for epoch in range(3):
        batches = whole[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = [index for batch in batches for _, index in batch]
        assert len(set(seen)) == len(seen) == per_epoch * batch_size and set(seen) <= set(range(num_images))
        expected = epoch % fixed_views if fixed_views else epoch
        assert {view for batch in batches for view, _ in batch} == {expected}
    start = data.draw(st.integers(0, len(whole)))
    tail = EpochBatches(num_images, batch_size, seed, (start, len(whole)), fixed_views=fixed_views)
    assert list(tail) == whole[start:] and len(tail) == len(whole) - start


def test_any_seed_of_32_bits_gives_views_of_its_own(train):
    noise = [ViewDataset(train, Views(), seed, 8)[0, 0].noise for seed in (18_447, 20_261_101, 2**32 - 1)]
    assert len({tuple(x.flatten().tolist()) for x in noise}) == 3


def test_epochs_and_seeds_differ():
    first, second = ([list(EpochBatches(50, 5, seed, (0, 20)))] for seed in (0, 1))
    assert first != second
    assert [i for b in first[0][:10] for _, i in b] != [i for b in first[0][10:] for _, i in b]


def test_views_depend_on_seed_view_and_image_but_not_on_workers_or_place(train):
    order = EpochBatches(len(train), 3, 0, (0, 6))
    reference = read(train, order)
    for workers in (1, 2):
        torch.manual_seed(workers)
        for expected, found in zip(reference, read(train, order, workers), strict=True):
            assert torch.equal(expected.views[0], found.views[0]) and torch.equal(expected.noise, found.noise)
    by_key = {(int(v), int(i)): row for b in reference for v, i, row in zip(b.view, b.image, b.views[0], strict=True)}
    for batch in read(train, EpochBatches(len(train), 2, 5, (0, 8))):  # other order, other batches
        for view, index, row in zip(batch.view, batch.image, batch.views[0], strict=True):
            assert torch.equal(row, by_key[int(view), int(index)])
    other = read(train, order, seed=4)
    assert not torch.equal(other[0].views[0], reference[0].views[0])
    assert not torch.equal(by_key[0, 1], by_key[1, 1])


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, None, 1), (2, None, 1), (8, None, 7), (64, None, 8), (16, "4", 3), (8, "8", 1)],
)
def test_workers_take_the_cores_that_are_left(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(loader_module.os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert LoaderConfig().num_workers == workers
    assert LoaderConfig(workers=0).num_workers == 0 and LoaderConfig(workers=3).num_workers == 3


def test_fixed_views_repeat(train):
    batches = read(train, EpochBatches(len(train), 9, 0, (0, 4), fixed_views=2))
    rows = [b.views[0][b.image.argsort()] for b in batches]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[1])
    noise = [b.noise[b.image.argsort()] for b in batches]
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_of_the_training_alone(train, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(train, EpochBatches(len(train), 3, 0, (0, 3)), workers)
    list(evaluation_batches(train, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_file_is_replaced_by_the_next_one(folder, train):
    (folder / "train" / "3.png").write_bytes(b"not an image")
    (folder / "train" / "4.png").unlink()
    (folder / "train" / "8.png").write_bytes(b"")
    order = EpochBatches(len(train), 9, 0, (0, 1))
    (batch,) = read(train, order)
    assert sorted(batch.image[~batch.readable].tolist()) == [3, 4, 8]
    (again,) = read(train, order, workers=1)
    assert torch.equal(batch.views[0], again.views[0])
    dataset = ViewDataset(train, lambda image: ((image,), torch.zeros(0)), 0, 0)
    for broken, stand_in in ((3, 5), (4, 5), (8, 0)):
        assert torch.equal(dataset[0, broken].views[0], train.load(stand_in))


def test_too_many_unreadable_files_end_the_run(folder, train, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_UNREADABLE_RUN", 3)
    for i in range(3):
        (folder / "train" / f"{i}.png").write_bytes(b"")
    dataset = ViewDataset(train, Views(), 0, 0)
    assert not dataset[0, 1].readable
    with pytest.raises(ValueError, match=r"3 files in a row are unreadable, from .*0\.png"):
        dataset[0, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal(train, number):
    """Signals go to the whole process group; the loop needs batches until the step in hand is done."""
    dataset = ViewDataset(train, Views(), 0, 0)
    batches = iter(training_batches(dataset, EpochBatches(len(train), 3, 0, (0, 30)), LoaderConfig(workers=1)))
    next(batches)
    os.kill(batches._workers[0].pid, number)
    assert len(list(batches)) == 29


def test_evaluation_views_come_in_order_and_white_where_unreadable(folder, capsys):
    (folder / "train" / "2.png").write_bytes(b"")
    train = load_images(str(folder)).train
    batches = list(evaluation_batches(train, 8, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    whole = torch.cat(batches)
    assert whole.dtype == torch.float32 and whole.min() >= 0 and whole.max() <= 1
    assert bool((whole[2] == 1).all())
    chosen = torch.cat(list(evaluation_batches(train, 8, indices=torch.tensor([5, 1]))))
    assert torch.equal(chosen, whole[[5, 1]])
    list(evaluation_batches(train, 8))
    assert capsys.readouterr().err.count(f"1 unreadable images of {train.name} are scored as white images") == 1


def test_processes_share_every_batch():
    whole = list(EpochBatches(20, 6, 0, (0, 6)))
    shares = [list(EpochBatches(20, 6, 0, (0, 6), share=(process, 2))) for process in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part) for part in parts] == [3, 3] and sorted(sum(parts, [])) == sorted(batch)  # noqa: RUF017


def test_a_worker_whose_training_process_was_killed_says_nothing(capfd):
    for error in (EOFError(), ConnectionResetError(), BrokenPipeError()):
        loader_module._tell_unless_alone(type(error), error, None)
    assert capfd.readouterr().err == ""
    loader_module._tell_unless_alone(KeyError, KeyError("a fault"), None)
    assert "KeyError: 'a fault'" in capfd.readouterr().err
