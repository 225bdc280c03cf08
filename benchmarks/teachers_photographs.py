"""Score frozen teachers on labelled photographs: kNN and linear probe of every block and pool, each at its own size.

    python benchmarks/teachers_photographs.py --data FOLDER --teachers efficientnet-lite0 dinov2=FOLDER --out FILE.json

The folder has one sub-folder per label, as ``torchvision.datasets.Caltech101`` has it. What is in the file is not
computed again, so a run that was stopped goes on. Depth and pool are to be chosen by the validation images; the numbers
of the test images are of no part in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from comad.data.images import ImageSet, load_images
from comad.data.loader import evaluation_batches
from comad.evaluation.features import Features, FeatureSplits
from comad.evaluation.linear import LinearProbe
from comad.evaluation.views import readable
from comad.models.backbone import Backbone, Tokens
from comad.models.networks import gives_tokens
from comad.models.teachers import Teacher, load_teacher

SHARES = {"train": 0.5, "val": 0.15, "test": 0.35}
"""Of the images that are drawn."""
EPOCHS = 30
"""Of the linear probe."""
Key = tuple[int, str]
"""Number of the block, and the pool."""


def pools_of(tokens: Tokens, with_cls: bool) -> dict[str, Tensor]:
    """Class token, mean patch, and both side by side, each of length 1."""
    pools = {"patch": tokens.patches.float().mean(dim=1)}
    if tokens.cls is not None and with_cls:
        unit = [torch.nn.functional.normalize(x, dim=1) for x in (tokens.cls.float(), pools["patch"])]
        pools = {"cls": tokens.cls.float(), **pools, "cls+patch": torch.cat(unit, dim=1)}
    return pools


def tokens_of_blocks(backbone: Backbone, batch: Tensor) -> dict[int, Tokens]:
    """Number of the block → its tokens after the final norm; 0 for a network without a row of blocks."""
    network = cast(Any, next(backbone.children()))
    if not gives_tokens(network) or not hasattr(network, "blocks"):
        return {0: backbone(batch)}
    depth = len(network.blocks)
    found = backbone(batch, intermediates=range(1, depth + 1)).intermediates
    normed = [Tokens(None if x.cls is None else network.norm(x.cls), network.norm(x.patches)) for x in found]
    return dict(enumerate(normed, start=1))


@torch.inference_mode()
def features_of(backbone: Backbone, images: ImageSet, indices: Tensor) -> dict[Key, Tensor]:
    """Pooled tokens of every block."""
    rows: dict[Key, list[Tensor]] = {}
    for batch in evaluation_batches(images, backbone.image_size, 32, indices):
        for block, tokens in tokens_of_blocks(backbone, batch).items():
            for pool, x in pools_of(tokens, "cls" in backbone.token_types).items():
                rows.setdefault((block, pool), []).append(x)
    return {key: torch.cat(parts) for key, parts in rows.items()}


def scores_of(teacher: Teacher, data: str, count: int) -> dict[str, Any]:
    """kNN and linear probe of every block and pool, percent; chosen settings by validation."""
    splits, started = readable(load_images(data)), time.perf_counter()
    drawn, found = {}, {}
    for part, share in SHARES.items():
        images = getattr(splits, part)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        drawn[part] = order[: round(count * share)]
        found[part] = features_of(teacher.backbone, images, drawn[part])
    seconds, rows = time.perf_counter() - started, []
    for block, pool in found["train"]:
        parts = [
            Features(
                {pool: found[part][block, pool]},
                {"fine": getattr(splits, part).labels["fine"][drawn[part]]},
                getattr(splits, part).groups[drawn[part]],
            )
            for part in SHARES
        ]
        features = FeatureSplits(*parts)
        knn, linear = NearestNeighbours()(features), LinearProbe(epochs=EPOCHS)(features)
        rows.append(
            {
                "block": block,
                "pool": pool,
                "knn_validation": round(knn.validation, 2),
                "knn": round(knn.top1["fine"], 2),
                "linear_validation": round(linear.validation, 2),
                "linear": round(linear.top1["fine"], 2),
            }
        )
    card = teacher.card.as_dict()
    return {
        "card": card,
        "images": {part: len(indices) for part, indices in drawn.items()},
        "labels": len(splits.train.labels["fine"].unique()),
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def table(name: str, result: dict[str, Any]) -> str:
    """The scores of one teacher, with what validation images choose."""
    images, size = result["images"], result["card"]["image_size"]
    lines = [
        f"{name}: {images['train']} images to train, {images['val']} to choose, {images['test']} to test, "
        f"{result['labels']} labels, {size} pixels",
        "block  pool       kNN  linear",
    ]
    rows = result["rows"]
    best = {score: max(rows, key=lambda row: row[f"{score}_validation"]) for score in ("knn", "linear")}
    for row in rows:
        marks = "".join(f"  best {score} by validation" for score, chosen in best.items() if chosen is row)
        lines.append(f"{row['block'] or '-':>5}  {row['pool']:9} {row['knn']:5.1f} {row['linear']:7.1f}{marks}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of photographs, one sub-folder per label")
    parser.add_argument("--teachers", nargs="+", required=True, help="as for comad distill, with :size= if wanted")
    parser.add_argument("--images", type=int, default=2000, help="images that are drawn of all parts together")
    parser.add_argument("--out", default="benchmarks/results/teachers_photographs.json", help="JSON, read and written")
    parser.add_argument("--bf16", action="store_true", help="networks compute in bf16, faster on CPUs with AMX")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    stored = json.loads(out.read_text()) if out.is_file() else {}
    for spec in options.teachers:
        teacher = load_teacher(spec, dtype=torch.bfloat16 if options.bf16 else torch.float32)
        precision = ", bf16" if options.bf16 else ""
        key = f"{teacher.name}, {teacher.card.image_size} pixels, {options.images} images{precision}"
        if stored.get(key, {}).get("card", {}).get("sha256") != teacher.card.sha256:
            stored[key] = scores_of(teacher, options.data, options.images)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(stored, indent=1) + "\n")
        sys.stdout.write(table(key, stored[key]) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
