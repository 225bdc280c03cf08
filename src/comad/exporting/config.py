"""What is asked of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from comad.exporting.formats import FORMATS, OPSET
from comad.runtime.spelling import hint


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a student, or any backbone, as files that other programs run; each is opened and compared with it.

    Args:
        backbone: the folder of a run, an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        to: timm, transformers, state-dict, torch-export, onnx, int8, openvino, openvino-int8, executorch.
        out: the folder to write; left out, RUN/export of a run, else exports/NAME.
        data: images to compare and to calibrate with, a folder or the name of a bundled set; left out, those that the
            run learnt from, else stamps.
        image_size: pixels on the side of the images; left out, as the student was trained.
        precision: of the weights, fp32 or fp16; 8-bit files are made of the first.
        batch: images per call that the files are fixed to; left out, any number, and 1 for executorch.
        opset: of ONNX files.
        images: validation images that every file is compared on.
        calibration: training images that set the ranges of 8 bits.
        keep_failed: keep files that are not as near to the student as they should be, and mark them.
    """

    backbone: str = ""
    to: tuple[str, ...] = ("timm", "transformers", "onnx")
    out: str | None = None
    data: str | None = None
    image_size: int | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    batch: int | None = None
    opset: int = OPSET
    images: int = 64
    calibration: int = 300
    keep_failed: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "images", "calibration"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} is too small; use 1 or more.")


def check(config: ExportConfig) -> None:
    """Say what is wrong with a request before anything is loaded.

    Raises:
        ValueError: no format, an unknown one, one whose packages are missing, or one that cannot be had in 16 bits.
    """
    if not config.to:
        raise ValueError(f"name a format: --to {' '.join(FORMATS)}.")
    for name in config.to:
        if name == "coreml":
            raise ValueError("coreml is left out: coremltools cannot convert this torch's programs; take --to onnx.")
        if name not in FORMATS:
            raise ValueError(f"no format {name!r}; {hint(name, FORMATS)}")
        if missing := FORMATS[name].missing():
            extra = FORMATS[name].extra
            raise ValueError(f"--to {name} needs {', '.join(missing)}; run: pip install 'comad[{extra}]'.")
