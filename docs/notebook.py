"""Writes the tutorial as a page, for the site: `make docs` runs it. The notebook is what is edited."""

import json
from pathlib import Path

DOCS = Path(__file__).parent


def page() -> str:
    """The notebook as Markdown; it is kept without output."""
    cells = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    shown = [f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts]
    return "\n\n".join([*shown, "[This page as a notebook](tutorial.ipynb)\n"])


if __name__ == "__main__":
    (DOCS / "tutorial.md").write_text(page(), encoding="utf-8")
