"""Compile the blocks of a network: all of them share one graph, so that compiling takes as long as for one block."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

from comad.models.backbone import Backbone

SHAPES = 64
"""Shapes of input that blocks may be compiled for: M teachers, the student, and masks that move over the run."""


def need_compiler() -> None:
    """Make sure that torch.compile finds the compiler which builds its code.

    Raises:
        ValueError: there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ValueError(
            f"--compile needs a C++ compiler, and there is no {compiler!r}; install one (apt install g++), name it in "
            "the environment variable CXX, or leave --compile out."
        )


def compile_blocks(backbone: Backbone) -> None:
    """Compile the blocks of a network, once per shape of their input. Results differ by rounding.

    Copies of the network and its state dict are those of a plain one. One without blocks is left as it is.
    """
    for block in backbone.blocks:
        block.compile(dynamic=False, recompile_limit=SHAPES)


def eager_mode(compiled: bool) -> AbstractContextManager[object]:
    """Within the context compiled blocks run as they were written, on shapes that do not come again."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
