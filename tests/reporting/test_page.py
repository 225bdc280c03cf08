import copy
import hashlib
import html.parser
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import yaml

from comad.reporting.page import ASSETS, ReportConfig, report, write_report
from comad.reporting.samples import Neighbours, collect
from comad.runtime.seal import sealed, sealed_text

from .conftest import write_run

FILES = (
    "config.yaml",
    "log.jsonl",
    "scoreboard.json",
    "scores.json",
    "student/config.json",
    "report.npz",
    "facts.json",
)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&{{7*7}}"
VOID = {"meta", "img", "br", "link", "input"}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(*folders, out=None):
    return Page(write_report(folders, out).read_text(encoding="utf-8"))


def test_a_whole_page(run):
    page = page_of(run)
    for heading in (
        "Scoreboard", "Health of the training", "Curves", "What the student has of each teacher", "Masks", "Gate",
        "Features as colours", "Nearest neighbours", "Classes, and what the student lost", "Data and cost",
        "How to repeat it", "Exports", "Licences", "The student is better than its untrained self",
        "comad distill --data animals", "optim.epochs", "training images", "difference 3e-6", "30 min",
    ):  # fmt: skip
        assert heading in page.text, heading
    assert "could not be shown" not in page.text
    images = page.of("img")
    assert len(images) > 100 and all(
        image.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,") for image in images
    )
    first = {image["id"] for image in images if "src" in image}
    assert all("src" in image or f"image{image['data-as']}" in first for image in images)
    assert all("alt" in image for image in images)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_page_is_one_small_file_that_loads_nothing(run):
    path = write_report([run])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == run / "report.html" and path.stat().st_size < 1_000_000
    assert not page.of("link") and not any("src" in attrs for attrs in page.of("script"))
    assert not re.search(r"url\((?!data:)", text) and "@import" not in text
    policy = next(attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_chart_library_is_as_published():
    published = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert hashlib.sha256((ASSETS / "uPlot.iife.min.js").read_bytes()).hexdigest() == published


def test_hostile_names_are_text(tmp_path):
    run = write_run(tmp_path / "run", names=(HOSTILE, "b"), classes=(HOSTILE, "x", "y"), licence=HOSTILE)
    facts = {
        "command": HOSTILE,
        "changed": {HOSTILE: [HOSTILE, 1]},
        "data": {HOSTILE: HOSTILE},
        "exports": [{HOSTILE: HOSTILE}],
    }
    (run / "facts.json").write_text(json.dumps(facts))
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, HOSTILE: 1.0, f"share_{HOSTILE}": 0.5, "warning": HOSTILE}) + "\n")
    text = write_report([run]).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.of("script")) == 2 and not any("onerror" in attrs for _, attrs in page.tags)
    assert "alert(1)</script>" not in text and page.text.count("alert(1)") > 10
    data = json.loads(re.search(r'id="chart-data">(.*?)</script>', text, re.DOTALL)[1])
    assert any(part["name"] == HOSTILE for chart in data for part in chart["series"])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_told(run, name):
    (run / name).unlink()
    page = page_of(run)
    assert f"1 file of this run could not be shown {name} is not there." in page.text
    assert "Data and cost" in page.text


SHORT = {"correct": {"knn": "01"}, "groups": {"knn": [1]}, "row": {"name": "student", "role": "student"}}
DAMAGED = (
    b"",
    b"\xff\x00nonsense",
    b"[1, 2]",
    b"null",
    b'{"rows": 5}',
    b'{"rows": [{"name": 7}]}',
    json.dumps({"scores": [SHORT]}).encode(),
    b'{"comad": {"teachers": [3]}, "changed": 4, "data": [1], "exports": {"a": 1}}',
    b'{"comad": null, "rows": null, "scores": null}',
)


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_told(run, name, content):
    (run / name).write_bytes(content)
    page = page_of(run)
    harmless = name == "facts.json" and content.startswith(b"{")
    harmless |= name == "log.jsonl" and not content
    harmless |= name == "config.yaml" and content.startswith(b"{")
    assert harmless or name in page.text
    assert "Data and cost" in page.text


@pytest.mark.parametrize("name", ["config.yaml", "scoreboard.json", "scores.json", "facts.json", "student/config.json"])
def test_an_edit_that_fits_is_told_and_shown(run, name):
    path = run / name
    if path.suffix == ".yaml":
        whole = sealed_text(path.read_text())
        edited = whole.replace("animals", "people")
    else:
        plain = json.loads(path.read_text())
        plain = plain if "checksum" in plain else sealed(plain)
        whole = json.dumps(plain)
        edited = json.dumps({**plain, "more": 1})
    for text, told in ((whole, False), (edited, True)):
        path.write_text(text)
        assert (f"{name} was edited or damaged since it was written" in page_of(run).text) == told


def test_pipes_in_a_folder_are_not_waited_for(run, within):
    for name in FILES:
        (run / name).unlink()
        os.mkfifo(run / name)
    (run / "config.yaml").unlink()
    (run / "config.yaml").write_text("data: animals\n")
    with within(30):
        assert "files of this run could not be shown" in page_of(run).text


ODD = (None, -1, 10**400, 1e300, True, "\ud800", "x", [], [[]], {}, {"a": {"b": 1}}, float("nan"))


def spoil(plain, rng, depth=0):
    """Put an odd value somewhere into plain values."""
    if isinstance(plain, dict | list) and plain and (depth == 0 or rng.random() < 0.85):
        key = rng.choice(list(plain) if isinstance(plain, dict) else range(len(plain)))
        plain[key] = spoil(plain[key], rng, depth + 1)
        return plain
    return copy.deepcopy(rng.choice(ODD))


@pytest.mark.parametrize("seed", range(25))
def test_odd_values_anywhere_stop_nothing(run, seed):
    rng = random.Random(seed)
    (run / "report.npz").unlink()
    for name in ("scoreboard.json", "scores.json", "student/config.json", "facts.json", "config.yaml"):
        path = run / name
        plain = yaml.safe_load(path.read_text())
        path.write_text(json.dumps(spoil(plain, rng)))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spoil(lines, rng)))
    assert "Data and cost" in page_of(run).text


def test_options_that_hold_themselves_are_told(run):
    (run / "config.yaml").write_text("a: &a\n  b: *a\n")
    assert "config.yaml is damaged" in page_of(run).text


def test_a_large_run_stays_below_three_megabytes(run):
    rng, names = np.random.default_rng(0), ("mae", "dino", "c", "d", "e", "student")
    noise = rng.integers(0, 255, (8, 224, 224, 3), dtype=np.uint8)  # what compresses worst
    images = dict(enumerate(rng.integers(0, 255, (192, 64, 64, 3), dtype=np.uint8)))
    numbers = np.arange(192).reshape(6, 8, 4)
    collect(
        run,
        noise,
        masks={name: rng.random((8, 196)) < 0.5 for name in names},
        gate={name: rng.random((8, 196)) for name in names[:5]},
        features={name: rng.standard_normal((8, 196, 64)) for name in (*names, "target")},
        neighbours=Neighbours(dict(zip(names, numbers, strict=True)), images),
    )
    log = [{"step": i} | {f"loss/{k}": 1 / (i + k) for k in range(1, 40)} for i in range(1, 5001)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    assert 300_000 < write_report([run]).stat().st_size < 3_000_000


def test_ten_rich_runs_stay_below_three_megabytes(tmp_path):
    rng, names, folders = np.random.default_rng(0), ("mae", "dino", "c", "d", "student"), []
    log = [{"step": i} | {f"loss/{k}": np.sin(i * k) for k in range(1, 25)} for i in range(1, 2001)]

    def photographs(count, side):  # as smooth as photographs: large shapes, some detail
        coarse, fine = rng.random((count, 4, 4, 3)), rng.random((count, side // 4, side // 4, 3))
        parts = [part.repeat(side // part.shape[1], 1).repeat(side // part.shape[1], 2) for part in (coarse, fine)]
        return (180 * parts[0] + 60 * parts[1]).astype(np.uint8)

    shared = photographs(8, 224)
    for number in range(10):
        folders.append(write_run(tmp_path / str(number)))
        thumbnails, near = dict(enumerate(photographs(160, 64))), np.arange(160).reshape(5, 8, 4)
        collect(
            folders[-1],
            shared,
            masks={name: rng.random((8, 196)) < 0.5 for name in names},
            gate={name: rng.random((8, 196)) for name in names[:4]},
            features={name: rng.standard_normal((8, 196, 64)) for name in (*names, "target")},
            neighbours=Neighbours(dict(zip(names, near, strict=True)), thumbnails),
        )
        (folders[-1] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    path = write_report(folders, tmp_path / "ten.html")
    text = path.read_text()
    assert path.stat().st_size < 3_000_000 and text.count("data-as=") > 10 * 8
    assert len(re.findall('<article id="run', text)) == 10


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    page = page_of(tmp_path)
    assert "No file names teachers" in page.text and "no log to judge" in page.text


def test_no_labels_are_said_in_the_words_of_the_board(run):
    rows = [{"name": "student", "role": "student", "params": 5, "knn": None, "reason": "0 train images have a label."}]
    (run / "scoreboard.json").write_text(json.dumps({"rows": rows}))
    assert "It has no scores: 0 train images have a label." in page_of(run).text


def test_scores_that_are_new_are_shown(run):
    board = json.loads((run / "scoreboard.json").read_text())
    board["rows"][1]["scores"] = {"zero_shot": 12.34}
    (run / "scoreboard.json").write_text(json.dumps(board))
    page = page_of(run)
    assert "zero_shot" in page.text and "12.3" in page.text


def test_several_runs_and_a_comparison_on_one_page(run, comparison, tmp_path):
    other = write_run(tmp_path / "other")
    page = page_of(run, comparison, other, out=tmp_path / "pages" / "all.html")
    links = {attrs["href"] for attrs in page.of("a")}
    assert links == {"#run0", "#run1", "#comparison0"}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and links <= {f"#{name}" for name in ids}


def test_a_run_of_several_students(run, tmp_path):
    (tmp_path / "both").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "both")
    for name in ("vit_a", "vit_b"):
        shutil.copytree(run, tmp_path / "both" / name)
    page = page_of(tmp_path / "both")
    assert {attrs["href"] for attrs in page.of("a")} == {"#run0", "#run1"} and "vit_b" in page.text


def test_a_comparison(comparison):
    page = page_of(comparison)
    assert "Worse than comad in kNN: sum (-2.0)." in page.text and "the intervals are too short" in page.text
    rows = [attrs.get("class", "") for attrs in page.of("tr")]
    assert rows.count("good beyond") == 1  # the teacher, far above, does not set the scale
    assert "−11.0" in page.text
    (comparison / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        write_report([comparison])


def test_bad_calls_are_told_before_any_work(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folders, out, words in (
        ([], None, "name a run's folder"),
        ([run, run], None, "--out FILE.html"),
        ([run], empty, "is a folder"),
        ([empty], None, "holds no run"),
        ([tmp_path / "nowhere"], None, "holds no run"),
    ):
        with pytest.raises(ValueError, match=words):
            write_report(folders, out)
    assert not list(empty.iterdir())


def test_the_verb_says_where_the_page_is(run):
    said = re.fullmatch(
        r"the report is in (.*) \(0\.\d MB\); open it in a browser\.", report(ReportConfig(runs=(str(run),)))
    )
    assert said and said[1] == str(run / "report.html")
