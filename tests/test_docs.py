"""Links in README and docs lead somewhere, commands in them are ones that the program takes, and messages exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import pytest
import timm
import yaml

import comad
from comad import api, cli, recipes
from comad.distillation.results import DistillResult
from comad.presets import recipe as preset_recipe
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
        first, last = results.MARKS
        before, _, rest = TEXTS[ROOT / page].partition(first)
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(f"{before}{first} old {last}{rest.partition(last)[2]}", encoding="utf-8")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.main()
    for page in pages:
        assert (tmp_path / page).read_text(encoding="utf-8") == TEXTS[ROOT / page], page


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced blocks in some language; "" is none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def commands() -> list[str]:
    """Of fenced blocks, as they are typed, started by a launcher or behind the name of a script."""
    lines = [
        line.partition(" || ")[0]
        for text in TEXTS.values()
        for block in blocks(text, "", "sh", "bash")
        for line in block.replace("\\\n", "").splitlines()
    ]
    typed = (re.match(r"(?:\$ |torchrun .*-m |python -m |srun .*?)?(comad .*)", line) for line in lines)
    return sorted({found[1] for found in typed if found})


def spoken() -> dict[str, set[str]]:
    """Verb, with its kind, → options that the text says behind it."""
    found: dict[str, set[str]] = {}
    for text in TEXTS.values():
        for line in re.findall(r"`(comad [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            words = re.sub(r'"[^"]*"', "WORDS", line).replace("\n", " ").split()[1:]
            if words[0] in cli.VERBS and "--plugin" not in words:
                kind = words[1:2] if f"{words[0]} {' '.join(words[1:2])}" in KINDS else []
                found.setdefault(" ".join([words[0], *kind]), set()).update(w for w in words if w.startswith("--"))
    return {verb: options for verb, options in found.items() if options}


KINDS = {
    *(f"evaluate {kind}" for kind in cli.EVALUATIONS),
    *("plan segment", "plan detect", "pretrain mae", "pretrain mocov3", "pretrain ibot"),
    *("teachers inspect", "teachers compare", "data scenes", "data shard"),
}


def test_options_in_the_text_are_those_of_the_verb():
    said = spoken()
    assert sum(map(len, said.values())) > 25
    unknown = {}
    for verb, options in said.items():
        name, *kind = verb.split()
        known = completion.options_of(lambda words, name=name, kind=kind: cli.VERBS[name][1]([*kind, *words]))
        unknown[verb] = options - {*known, "--help", "--help-all"}
    assert not any(unknown.values()), unknown


def test_scripts_that_are_named_exist_with_their_questions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods
    import photographs

    questions = {"methods": methods.QUESTIONS, "photographs": photographs.QUESTIONS}
    named = [
        found
        for text in TEXTS.values()
        for found in re.findall(r"python benchmarks/(\w+)\.py((?: (?:--\w+ (?:FOLDER|PYTHON)|[a-z-]+))*)", text)
    ]
    assert len(named) > 20
    for script, rest in named:
        assert (ROOT / "benchmarks" / f"{script}.py").is_file(), script
        if script in questions:
            assert set(re.sub(r"--\w+ (?:FOLDER|PYTHON)", "", rest).split()) <= questions[script].keys(), rest


def test_python_calls_functions_as_they_are(monkeypatch: pytest.MonkeyPatch):
    """In README and docs/export.md; docs/adding.md is executed by the tests of slots, the tutorial by its own."""
    (readme,) = blocks(TEXTS[ROOT / "README.md"], "python")
    distill = create_autospec(api.distill)
    monkeypatch.setattr(comad, "distill", distill, raising=False)
    exec(readme, {"my_module": object(), "image": MagicMock()})
    api.override(preset_recipe("comad", demo=False), {"epochs": distill.call_args.kwargs["epochs"]})
    assert all(hasattr(DistillResult, name) for name in ("student", "transform"))

    program, calls = blocks(TEXTS[DOCS / "export.md"], "python")
    for module, names in re.findall(r"^from (comad\.\S+) import (.*)$", calls, flags=re.MULTILINE):
        for name in names.split(", "):
            monkeypatch.setattr(f"{module}.{name}", create_autospec(getattr(importlib.import_module(module), name)))
    for name in re.findall(r"^comad\.(\w+)\(", calls, flags=re.MULTILINE):
        monkeypatch.setattr(comad, name, create_autospec(getattr(comad, name)), raising=False)
    exec(calls, {"backbone": object(), "head": object(), "splits": object()})
    compile(program, "export.md", "exec")


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
