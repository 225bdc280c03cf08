"""Checksums inside text files that a run reads back: an edit by hand or a bad disk is told, never believed in silence.

A JSON object has its own under the key ``checksum``, YAML in a comment on its first line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

KEY = "checksum"
LINE = "# sha256 of what follows: {}; it may be edited, which is told\n"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum."""
    bare = {key: value for key, value in content.items() if key != KEY}
    return bare | {KEY: _digest(json.dumps(bare, sort_keys=True))}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as it was sealed; one without a checksum is."""
    return content.get(KEY, "") in ("", sealed(content)[KEY])


def sealed_text(text: str) -> str:
    """A YAML text behind a line with its checksum."""
    return LINE.format(_digest(text)) + text


def is_text_intact(text: str) -> bool:
    """Whether a YAML text is as it was sealed; one without a checksum is."""
    line, _, rest = text.partition("\n")
    found = re.match(LINE.partition("{")[0] + "([0-9a-f]*)", line)
    return found is None or found[1] == _digest(rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
