"""The ablations of arXiv:2508.04816 in its own rows. Add one: an entry in `ABLATIONS`."""

from __future__ import annotations

from collections.abc import Mapping

from comad.presets import METHODS

MASKS = "comad --masking.mask-ratio {} --masking.teacher-mask-ratios {} {} {}"

ABLATIONS: dict[str, Mapping[str, str]] = {
    "gate": {
        "Uniform (no gating)": "comad-uniform",
        "Aff. only": "comad-affinity-only",
        "Cons. only": "comad-consensus-only",
        "Combined (ours)": "comad",
    },
    "masks": {
        "0.80: 0.45 0.35 0.25": MASKS.format(0.8, 0.45, 0.35, 0.25),
        "0.75: 0.50 0.40 0.30": MASKS.format(0.75, 0.5, 0.4, 0.3),
        "0.70: 0.55 0.45 0.35": MASKS.format(0.7, 0.55, 0.45, 0.35),
    },
    "losses": {
        **({"TinyMIM (baseline)": "tinymim"} if "tinymim" in METHODS else {}),
        "+ TFD only": "comad-token-only",
        "+ SFD only": "comad-spatial-only",
        "m-TinyMIM (mean)": "mean",
        "Dual w/ MSE": "comad-mse",
        "Dual w/ KL (ours)": "comad",
    },
    "teachers": {},
}
"""Ablation → the paper's name of a row → preset and options. ``teachers`` is comad with every subset of --teachers.

``gate`` is Table 6, ``masks`` Table 5 (hidden from the student: hidden from each teacher), ``losses`` Table 3, and
``teachers`` Table 4, with the pair that the paper leaves out.
"""
OURS = {"gate": "Combined (ours)", "masks": "0.75: 0.50 0.40 0.30", "losses": "Dual w/ KL (ours)"}
"""Ablation → its row of reference."""
