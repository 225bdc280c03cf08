"""Pictures to measure with: photographs in size and detail, drawn from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Path:
    """Write JPEG files of about 140 KB each: noise whose power falls with frequency as a photograph's does."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    columns, rows = size
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    frequency[0, 0] = 1.0
    for number in range(count):
        noise = np.fft.rfft2(generator.standard_normal((3, rows, columns)))
        picture = np.fft.irfft2(noise / frequency**0.9, s=(rows, columns))
        picture = (128 + 55 * picture / picture.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{number:05}.jpg", quality=90)
    return folder
