"""Score frozen teachers on labelled photographs: kNN and linear probe of every block and pool, each at its own size.

    python benchmarks/teachers_photographs.py --data FOLDER --teachers efficientnet-lite0 dinov2=FOLDER --out FILE.json

``--student 96 12`` scores them also as a distillation into a student of 96 pixels in patches of 12 loads them, with
``--teacher-image-size own`` and ``grid``: by their last tokens, at the size at which they would see these images.

The folder has one sub-folder per label, as ``torchvision.datasets.Caltech101`` has it. What is in the file is not
computed again, so a run that was stopped goes on. Depth and pool are to be chosen by the validation images; the numbers
of the test images are of no part in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from comad.data.images import ImageSet
from comad.data.load import load_images
from comad.data.loader import evaluation_batches
from comad.distillation.setup import prepare
from comad.evaluation.features import Features, FeatureSplits
from comad.evaluation.knn import KNN
from comad.evaluation.linear import LinearProbe
from comad.evaluation.views import readable
from comad.models.backbone import Backbone, Tokens
from comad.models.networks import gives_tokens
from comad.models.students import VitConfig
from comad.models.teachers import Teacher, load_teacher
from comad.presets import recipe
from comad.runtime.run import RunConfig, start_fabric

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


def tokens_of_blocks(backbone: Backbone, batch: Tensor, last: bool) -> dict[int, Tokens]:
    """Number of the block → its tokens after the final norm; 0 for the output, which is all of some networks."""
    network = cast(Any, next(backbone.children()))
    if last or not gives_tokens(network) or not hasattr(network, "blocks"):
        return {0: backbone(batch)}
    depth = len(network.blocks)
    found = backbone(batch, intermediates=range(1, depth + 1)).intermediates
    normed = [Tokens(None if x.cls is None else network.norm(x.cls), network.norm(x.patches)) for x in found]
    return dict(enumerate(normed, start=1))


@torch.inference_mode()
def features_of(backbone: Backbone, images: ImageSet, indices: Tensor, last: bool) -> dict[Key, Tensor]:
    """Pooled tokens of every block."""
    rows: dict[Key, list[Tensor]] = {}
    for batch in evaluation_batches(images, backbone.image_size, 32, indices):
        for block, tokens in tokens_of_blocks(backbone, batch, last).items():
            for pool, x in pools_of(tokens, "cls" in backbone.token_types).items():
                rows.setdefault((block, pool), []).append(x)
    return {key: torch.cat(parts) for key, parts in rows.items()}


def scores_of(teacher: Teacher, data: str, count: int, last: bool = False) -> dict[str, Any]:
    """kNN and linear probe of every block or the last, and pool, percent; chosen settings by validation."""
    splits, started = readable(load_images(data)), time.perf_counter()
    drawn, found = {}, {}
    for part, share in SHARES.items():
        images = getattr(splits, part)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        drawn[part] = order[: round(count * share)]
        found[part] = features_of(teacher.backbone, images, drawn[part], last)
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
        knn, linear = KNN()(features), LinearProbe(epochs=EPOCHS)(features)
        rows.append(
            {
                "block": block,
                "pool": pool,
                "knn_validation": round(knn.choices["validation_knn"], 2),
                "knn": round(knn.scores["knn"].percent, 2),
                "linear_validation": round(linear.choices["validation_linear"], 2),
                "linear": round(linear.scores["linear"].percent, 2),
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


def as_in_a_run(specs: Sequence[str], data: str, student: tuple[int, int], size: Any, precision: Any) -> list[Teacher]:
    """Teachers as a distillation has them that is told ``--teacher-image-size`` so."""
    vit = VitConfig(image_size=student[0], patch_size=student[1], width=48, depth=2, heads=2)
    config = replace(
        recipe("comad", demo=False),
        data=data,
        teachers=tuple(specs),
        student=vit,
        teacher_image_size=size,
        run=RunConfig(precision=precision, threads=torch.get_num_threads()),
    )
    return prepare(config, start_fabric(config.run)).teachers


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, Teacher, bool]]:
    """How a teacher was loaded, the teacher, and whether its last tokens are all that is scored."""
    precision = "bf16" if options.bf16 else "fp32"
    for spec in options.teachers:
        yield "", load_teacher(spec, dtype=torch.bfloat16 if options.bf16 else torch.float32), False
    for size in ("own", "grid") if options.student else ():
        image, patch = options.student
        for teacher in as_in_a_run(options.teachers, options.data, (image, patch), size, precision):
            yield f"{size} in a run of a {image}-pixel student in patches of {patch}, ", teacher, True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of photographs, one sub-folder per label")
    parser.add_argument("--teachers", nargs="+", required=True, help="as for comad distill, with :size= if wanted")
    parser.add_argument("--student", nargs=2, type=int, metavar=("IMAGE", "PATCH"), help="pixels; see above")
    parser.add_argument("--images", type=int, default=2000, help="images that are drawn of all parts together")
    parser.add_argument("--out", default="benchmarks/results/teachers_photographs.json", help="JSON, read and written")
    parser.add_argument("--bf16", action="store_true", help="networks compute in bf16, faster on CPUs with AMX")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    stored = json.loads(out.read_text()) if out.is_file() else {}
    for loaded, teacher, last in wanted(options):
        precision = ", bf16" if options.bf16 else ""
        key = f"{teacher.name}, {loaded}{teacher.card.image_size} pixels, {options.images} images{precision}"
        if stored.get(key, {}).get("card", {}).get("sha256") != teacher.card.sha256:
            stored[key] = scores_of(teacher, options.data, options.images, last)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(stored, indent=1) + "\n")
        sys.stdout.write(table(key, stored[key]) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
