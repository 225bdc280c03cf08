"""A student of LightlyTrain on photographs, for so many seconds; `photographs.py lightly` calls it and scores it.

    python benchmarks/lightly_student.py --data FOLDER/train --dinov2 FOLDER --seconds 400 --seed 0 --out FOLDER

Its `distillation` at its own defaults, but for ``--rate``; MobileNetV3-Small at 98 pixels, for the teacher's patches
are 14 wide, batch 128, fp32. ``--dinov2`` is a DINOv2-S in transformers' layout. How many epochs fit is measured by a
run of one, with all that it does around its steps, and rounded up. Needs `lightly-train`. The weights are in
`OUT/exported_models/exported_last.pt`; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightly_train
import torch
from safetensors.torch import load_file
from torch import Tensor

IMAGE_SIZE, BATCH_SIZE = 98, 128
REFERENCE = 1536
"""Its rates are for batches of so many, and scale with the square root."""
LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OTHERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in transformers' names of DINOv2, in those of its authors."""
    state = {name.removeprefix("dinov2."): tensor for name, tensor in state.items()}
    renamed = {theirs: state[ours] for ours, theirs in OTHERS.items()}
    depth = sum(name.endswith(".norm1.weight") for name in state)
    for block in range(depth):
        old, new = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            renamed |= {f"{new}{theirs}.{kind}": state[f"{old}{ours}.{kind}"] for ours, theirs in LAYERS.items()}
            qkv = [state[f"{old}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{new}attn.qkv.{kind}"] = torch.cat(qkv)
        for part in ("1", "2"):
            renamed[f"{new}ls{part}.gamma"] = state[f"{old}layer_scale{part}.lambda1"]
    return renamed


def train(options: argparse.Namespace, weights: Path, out: Path, epochs: int) -> float:
    """Seconds of a training, all that it does around its steps included."""
    arguments: dict[str, Any] = {
        "method_args": {"teacher": "dinov2/vits14-noreg", "teacher_weights": str(weights)},
        "transform_args": {"image_size": (IMAGE_SIZE, IMAGE_SIZE)},
    }
    start = time.perf_counter()
    lightly_train.pretrain(
        out=str(out),
        data=str(options.data),
        model=f"timm/{options.student}",
        method="distillation",
        epochs=epochs,
        batch_size=BATCH_SIZE,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        precision="32-true",
        num_workers=options.workers,
        seed=options.seed,
        overwrite=True,
        optim="adamw" if options.rate else "auto",
        optim_args={"lr": options.rate / math.sqrt(BATCH_SIZE / REFERENCE)} if options.rate else None,
        **arguments,
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure an epoch, and train for as many as fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the training images")
    parser.add_argument("--dinov2", type=Path, required=True, help="a DINOv2-S in transformers' layout")
    parser.add_argument("--student", default="mobilenetv3_small_100", help="a network of timm")
    parser.add_argument("--seconds", type=float, required=True, help="for the training; an epoch at least")
    parser.add_argument("--epochs", type=int, help="so many, instead of measuring how many fit")
    parser.add_argument("--rate", type=float, help="AdamW at this learning rate, instead of its LARS at 0.52")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        weights = Path(folder) / "dinov2.pth"
        torch.save(official_keys(load_file(options.dinov2 / "model.safetensors")), weights)
        epochs = options.epochs or math.ceil(options.seconds / train(options, weights, Path(folder) / "first", 1))
        seconds = train(options, weights, options.out, epochs)
    facts = {"seed": options.seed, "epochs": epochs, "seconds": seconds, "asked": options.seconds, "rate": options.rate}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
