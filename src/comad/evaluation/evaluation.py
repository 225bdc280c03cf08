"""What turns frozen features into scores. Add one: a subclass of `Evaluation` with a name, in a file of yours too."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from comad.evaluation.features import FeatureSplits
from comad.runtime.slots import Slot

LABEL_SETS = {"fine": "", "coarse": "_coarse"}
"""Label set → ending of the score's name: ``knn`` and ``knn_coarse``. The first one is required."""


class PerImage(NamedTuple):
    """What a score is the mean of.

    Attributes:
        correct: (n,), one per labelled test image in order: named rightly or not, or any float from 0 to 1.
        groups: (n,), the concepts of these images.
    """

    correct: Bool[Tensor, " n"] | Float[Tensor, " n"]
    groups: Int[Tensor, " n"]

    @property
    def percent(self) -> float:
        """The score."""
        return 100 * self.correct.double().mean().item()


class Result(NamedTuple):
    """What an evaluation found.

    Attributes:
        scores: score name → result of each test image; the name is a key in JSON and a column of tables.
        choices: plain values that were chosen on the validation images, by names of their own.
    """

    scores: dict[str, PerImage]
    choices: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Slot, slot="evaluation"):
    """Fits on the features of ``train``, chooses on ``val``, scores ``test``. Every member is on every scoreboard.

    Attributes:
        title: of the column in tables; the name if it is empty.
    """

    title: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, features: FeatureSplits, device: torch.device | str = "cpu") -> Result:
        """Score the features of one network, on a device."""

    def label_sets(self, features: FeatureSplits) -> tuple[str, ...]:
        """The label sets that can be scored; choices are made on the first.

        Raises:
            ValueError: no label set has labelled images in all three splits.
        """
        names = features.label_sets
        if not names:
            needs = "labels in train, val and test; give images in one folder per class."
            raise ValueError(f"{self.title or self.name} needs {needs}")
        for name in names:
            if empty := [part for part, rows in features._asdict().items() if not rows.known(name).any()]:
                lacks = f"no {name} label in {' and '.join(empty)}"
                raise ValueError(f"{lacks}; {self.title or self.name} needs some in each split.")
        return names

    def results(self, features: FeatureSplits, correct: dict[str, Tensor]) -> dict[str, PerImage]:
        """Scores called ``NAME`` and ``NAME_coarse``, of what was found for each label set."""
        known = {name: features.test.known(name) for name in correct}
        return {
            self.name + LABEL_SETS.get(name, f"_{name}"): PerImage(hits, features.test.groups[known[name]])
            for name, hits in correct.items()
        }


def choose(evaluations: tuple[Evaluation | str, ...] | None) -> tuple[Evaluation, ...]:
    """Evaluations by name or as they are; None is every member, with its defaults.

    Raises:
        ValueError: there is none of that name.
    """
    chosen = tuple(Evaluation.members) if evaluations is None else evaluations
    return tuple(Evaluation.choose(item) if isinstance(item, str) else item for item in chosen)


def score_names() -> list[str]:
    """Scores that every row has, None if they were not measured; other names follow them."""
    return [name + ending for name in (*Evaluation.members, "finetune") for ending in LABEL_SETS.values()]


def title_of(score: str) -> str:
    """What a score is called in tables: ``kNN``, ``kNN coarse``."""
    name = score.removesuffix(LABEL_SETS["coarse"])
    title = "fine-tune" if name == "finetune" else getattr(Evaluation.members.get(name), "title", "") or name
    return title if name == score else f"{title} coarse"
