"""Links in README and docs lead somewhere, commands in them are ones that the program takes, and messages exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import yaml

from comad import cli, recipes
from comad.runtime import completion

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES if path.name != "tutorial.md"}


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path):
    text = re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_site_has_every_page():
    def pages(entries):
        for entry in entries:
            (value,) = entry.values()
            yield from pages(value) if isinstance(value, list) else [value]

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in TEXTS if DOCS in path.parents} | {"tutorial.md"}
    assert len(listed) == len(set(listed)) and set(listed) == there


def test_the_notebook_becomes_a_page():
    names: dict = {"__file__": str(DOCS / "notebook.py"), "__name__": "notebook"}
    exec((DOCS / "notebook.py").read_text(), names)
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    assert names["page"]().count("```python") == sum(cell["cell_type"] == "code" for cell in cells)


def test_tables_between_marks_are_those_of_the_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`make results` changes nothing, so nobody wrote there by hand, and nothing outside the marks is lost."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results

    pages = [path.relative_to(ROOT) for path, text in TEXTS.items() if results.MARKS[0] in text]
    assert len(pages) == 4
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(TEXTS[ROOT / page].replace("| kNN |", "| old |"), encoding="utf-8")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.main()
    for page in pages:
        assert (tmp_path / page).read_text(encoding="utf-8") == TEXTS[ROOT / page], page


def commands() -> list[str]:
    """Of fenced blocks; those with a choice or a gap to be filled are no commands."""
    found = [
        line.strip().removeprefix("$ ")
        for text in TEXTS.values()
        for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        for line in block.replace("\\\n", "").splitlines()
        if line.strip().removeprefix("$ ").startswith("comad ")
    ]
    return sorted({line for line in found if "..." not in line and "|" not in line})


class ParsedError(Exception):
    """The options were understood."""


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def only_parse(real):
        def parse(*arguments, **named):
            real(*arguments, **named)
            raise ParsedError

        return parse

    monkeypatch.setattr(recipes, "fitted", lambda config, *rest: config)
    monkeypatch.setattr(cli, "parse", only_parse(cli.parse))
    monkeypatch.setattr(recipes, "parse", only_parse(recipes.parse))
    monkeypatch.setattr(completion, "options_of", lambda command: {})
    assert len(commands()) > 15
    for line in commands():
        verb, *rest = shlex.split(line.partition(" > ")[0].partition(" >> ")[0], comments=True)[1:]
        try:
            cli.VERBS[verb][1](rest)
        except ParsedError:
            continue
        except (SystemExit, ValueError) as error:
            pytest.fail(f"{line}: {error} {capsys.readouterr().err}")
        assert verb in ("doctor", "completion"), line  # cheap, so they ran


def test_teachers_that_are_named_are_timms_with_these_licences():
    table = TEXTS[DOCS / "teachers.md"].partition("## Teachers one can get")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for names, *_, licence in rows:
        for name in re.findall(r"`([^`]+)`", names):
            facts = timm.get_pretrained_cfg(name)
            assert facts is not None and facts.license, name
            assert LICENCES[facts.license] in licence, name
    named = re.findall(r"^\| `(.*?)` \|", TEXTS[ROOT / "README.md"], flags=re.MULTILINE)
    known = {name for names, *_ in rows for name in re.findall(r"`([^`]+)`", names)}
    assert {name for part in named if "." in part and " " not in part for name in part.split("`, `")} <= known


LICENCES = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "dinov3-license": "DINOv3 licence",
    "apple-ascl": "Apple's sample code licence",
}
OF_THE_SYSTEM = {"No space left on device", "File too large", "Read-only file system", "Permission denied"}


def test_messages_that_are_explained_exist():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| (`.*?) \| ", TEXTS[DOCS / "troubleshooting.md"].partition("## What may")[2], flags=re.M)
    assert len(rows) > 60
    for phrase in {phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)} - OF_THE_SYSTEM:
        for part in filter(None, (part.strip() for part in re.split(r"\.\.\.|a: 1 → 2", phrase))):
            assert part in source, phrase
