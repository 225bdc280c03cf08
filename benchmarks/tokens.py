"""What a teacher's tokens cost: a ViT-B/16 on 25, 50, 75 and 100 % of the patches of 224 px images, random weights.

Its weights are packed, as in a run; with plain ones beside them at 50 %. The embedding of a ViT-Ti's patches, forward
and backward, is measured as the product that it is here and as a convolution. The rounds are interleaved and count the
CPU seconds of this process. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn

from comad.distill.features import Blocks, forward_teacher
from comad.models.embedding import PatchProjection
from comad.models.onednn_linear import use_onednn_linear
from steps import load

SHARES = (25, 50, 75, 100)


def main() -> None:
    """Measure every share in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    teacher, plain = (load(["vit_base_patch16_224:random"], "bf16")[0] for _ in range(2))
    use_onednn_linear(teacher.backbone)
    images = torch.rand(options.batch_size, 3, 224, 224)
    order = torch.rand(options.batch_size, 196).argsort(dim=1)
    asked = {share: (teacher, share) for share in SHARES} | {"plain": (plain, 50)}
    seconds: dict[int | str, list[float]] = {name: [] for name in asked}
    for _ in range(options.rounds):
        for name, (network, share) in asked.items():
            visible = order[:, : 196 * share // 100].sort().values if share < 100 else None
            start = time.process_time()
            forward_teacher(Blocks(), network.backbone, images, visible)
            seconds[name].append(time.process_time() - start)
    tokens = {share: options.batch_size * (196 * share // 100) for share in SHARES}
    result = {f"tokens_per_s_{share}": tokens[share] / statistics.median(seconds[share]) for share in SHARES}
    result["packed_times_plain"] = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[50], strict=True))
    result["embedding_times_convolution"] = embedding_times_convolution(images, options.rounds)
    about = {"batch_size": options.batch_size, "torch": torch.__version__, "device": "cpu, per second of one core"}
    print(json.dumps({**result, **about}))


def embedding_times_convolution(images: Tensor, rounds: int) -> float:
    """How many times as fast the product is."""
    convolution = nn.Conv2d(3, 192, 16, 16)
    ratios = []
    for _ in range(1 + 5 * rounds):
        seconds = []
        for network in (convolution, PatchProjection(convolution)):
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                tokens = network(images)
            tokens.float().mean().backward()
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first warms up


if __name__ == "__main__":
    main()
