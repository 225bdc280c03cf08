import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from comad.data.images import UnreadableImageError
from comad.data.load import load_images
from comad.data.loader import EpochBatches, LoaderConfig, ViewDataset, training_batches
from comad.data.transforms import Crop


def image(number, shape=(10, 14)):
    return np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)


KINDS = {
    "PIL": lambda n: Image.fromarray(image(n)),
    "tensor": lambda n: torch.from_numpy(image(n)).permute(2, 0, 1),
    "array": lambda n: image(n).transpose(2, 0, 1),
    "pair": lambda n: (Image.fromarray(image(n)), n % 3),
    "dict": lambda n: {"image": Image.fromarray(image(n)), "label": n % 3},
}


class Own(Dataset):
    def __init__(self, count=60, kind="PIL"):
        self.count, self.kind = count, kind

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return KINDS[self.kind](index)


class Labelled(Own):
    classes = ("a", "b", "c")

    @property
    def targets(self):
        return [n % 3 for n in range(self.count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_an_image_set(kind):
    splits = load_images(Own(kind=kind))
    numbers = [int(part.key(i)) for part in splits[:3] for i in range(len(part))]
    assert sorted(numbers) == list(range(60)) and all(len(part) for part in splits[:3])
    assert splits.class_names == {} and "60" not in splits.source.split
    for index in range(len(splits.val)):
        assert np.array_equal(splits.val.load(index).permute(1, 2, 0), image(int(splits.val.key(index))))


def test_labels_and_names_are_those_of_the_dataset():
    splits = load_images(Labelled())
    assert splits.class_names == {"fine": ("a", "b", "c")}
    for part in splits[:3]:
        assert part.labels["fine"].tolist() == [int(part.key(i)) % 3 for i in range(len(part))]
    splits = load_images(Own(), labels=[n % 2 for n in range(60)])
    assert splits.class_names == {"fine": ("0", "1")}
    with pytest.raises(ValueError, match=r"\(59,\) labels for 60 images"):
        load_images(Own(), labels=[0] * 59)


def test_a_dict_of_datasets_has_parts():
    splits = load_images({"train": Labelled(60), "val": Labelled(7), "test": Labelled(9)})
    assert [len(part) for part in splits[:3]] == [60, 7, 9]
    splits = load_images({"train": Labelled(60), "val": Labelled(7)})
    assert len(splits.test) == 7 and len(splits.train) + len(splits.val) == 60 and len(splits.val) > 0
    assert "test is val" in splits.summary().text
    assert load_images(splits) is splits


def test_a_part_without_labels_is_unlabelled_beside_one_that_has_some():
    facts = load_images({"train": Labelled(60), "test": Own(7)}).summary().facts
    assert facts["unlabelled"] == {"train": 0, "val": 0, "test": 7} and facts["classes"] == {"fine": 3}


@pytest.mark.parametrize("data", [{}, {"training": [1]}, {"train": 3}, [], iter([1]), 5, None])
def test_what_is_no_dataset_is_refused(data):
    with pytest.raises(ValueError, match=r"no path, and no dataset|a dict of datasets has train"):
        load_images(data)


def test_the_fingerprint_is_of_pixels_and_labels():
    first = load_images(Labelled()).train.fingerprint()
    assert load_images(Labelled(kind="tensor")).train.fingerprint() == first
    assert load_images(Own()).train.fingerprint() != first
    assert load_images(Labelled(61)).train.fingerprint() != first


@pytest.mark.parametrize("item", [torch.rand(3, 4, 4), np.zeros((4, 4, 3), np.uint8), "text", None, {"x": 1}, ()])
def test_what_is_no_image_is_unreadable_and_ends_nothing(item):
    images = load_images({"train": [*(KINDS["PIL"](n) for n in range(30)), item], "val": Own(3), "test": Own(3)})
    (index,) = (i for i in range(len(images.train)) if images.train.key(i) == "30")
    with pytest.raises(UnreadableImageError, match="image 30 of dataset/train"):
        images.train.load(index)
    assert images.summary().facts["unreadable"]["train"] == ["30"]


def test_views_of_a_dataset_are_a_function_of_the_seed():
    images = load_images(Labelled()).train

    def read(workers):
        dataset = ViewDataset(images, Views(), 3, 0)
        batches = EpochBatches(len(images), 5, 3, (0, 4))
        return torch.cat(
            [batch.views[0] for batch in training_batches(dataset, batches, LoaderConfig(workers=workers))]
        )

    assert torch.equal(read(0), read(1))


class Views:
    def __call__(self, image):
        return (Crop(size=8)(image),), torch.rand(2)
