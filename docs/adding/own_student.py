"""A student of your own: any module whose forward gives a map of features, or tokens.

comad distill --student.name mine=docs/adding/own_student.py:build --student.image-size 64
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class Mine(nn.Module):
    """Normalised pixels (B, 3, H, W) → a map (B, 48, H / 16, W / 16). That is the whole contract.

    Tokens (B, P + N, E) with N patches in a square do as well. What is not as here is said by attributes, all optional:
    ``pixel_mean`` and ``pixel_std``, ``num_prefix_tokens`` (P), and ``has_cls``, if the first token is a class token.
    """

    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 24, 32, 48)
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """The map. Parameters that it does not depend on, such as those of a classifier, are frozen."""
        return self.layers(pixels)


def build() -> nn.Module:
    """What the command calls; the random weights are those of the run's seed."""
    return Mine()


def trained() -> nn.Module:
    """The student after the run, by the file that it left: ``comad evaluate probe mine=own_student.py:trained``."""
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file("student/model.safetensors"))
    return model
