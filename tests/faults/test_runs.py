"""Whatever happens to a run, the same command goes on to the same weights, or says in one line why it does not."""

import json
import random
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch

from comad.cli import main
from comad.runtime.checkpoint import load_checkpoint

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
STATE = [
    "checkpoints/step-00000006.pt",
    "checkpoints/step-00000004.pt",
    "log.jsonl",
    "config.yaml",
    "data.npy",
    "facts.json",
    ".lock",
    "teacher-cache/*/layout.json",
    "teacher-cache/*/rows.bin",
    "teacher-cache/*/checks.bin",
]


def flip(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def nuls(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :]


DAMAGE = {
    "flipped": flip,
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "nuls": nuls,
    "empty": lambda content, rng: b"",
    "text": lambda content, rng: b"[" * 5000,
    "gone": lambda content, rng: None,
}
QUICK = {
    ("checkpoints/step-00000006.pt", "flipped"), ("config.yaml", "text"), ("teacher-cache/*/layout.json", "text"),
}  # fmt: skip


def marked(cases, quick):
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 16))])
def test_signals_at_any_moment(start, command, whole, judge, tmp_path, seed):
    rng, out = random.Random(seed), tmp_path / "run"
    for _ in range(8 if seed else 2):
        running = start(command(out, f"--loader.workers={rng.randrange(2)}"))
        time.sleep(rng.uniform(0.1, 1.1) * whole[1])
        number = rng.choice(SIGNALS)
        running.signal(number)
        status, told = running.wait()
        assert "Traceback" not in told, told
        assert status in (0, 130, -number), told
    judge(out, *start(command(out)).wait(), refusal=False)


@pytest.mark.parametrize(("name", "damage"), marked([(name, damage) for name in STATE for damage in DAMAGE], QUICK))
def test_damaged_state(start, command, copied, judge, name, damage):
    for seed, path in enumerate(sorted(copied.glob(name))):
        changed = DAMAGE[damage](path.read_bytes() or b" ", random.Random(seed))
        path.unlink() if changed is None else path.write_bytes(changed)
    needed = name.startswith("checkpoints")  # a flip in the options of config.yaml may be refused
    judge(copied, *start(command(copied)).wait(), refusal=not needed)


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(stopped, tmp_path):
    path, rng = tmp_path / "step-00000006.pt", random.Random(0)
    content = (stopped / "checkpoints" / path.name).read_bytes()
    with zipfile.ZipFile(stopped / "checkpoints" / path.name) as archive:
        held = {record.filename: archive.read(record) for record in archive.infolist()}
    refused = 0
    for _ in range(200):
        path.write_bytes(flip(content, rng))
        try:
            load_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            with zipfile.ZipFile(path) as archive:
                assert {record.filename: archive.read(record) for record in archive.infolist()} == held
    assert refused > 100  # the others are flips of the room between the records


@pytest.mark.slow
def test_two_processes_on_one_folder(start, command, at_step, judge, tmp_path, within):
    out = tmp_path / "run"
    first = start(command(out), before=at_step(6, "os.kill(os.getpid(), signal.SIGSTOP)"))
    with within(120):
        while first.state != "T":
            time.sleep(0.05)
    status, told = start(command(out)).wait()
    assert judge(out, status, told) == "refused in one line" and f"in use by process {first.pid}" in told
    first.signal(signal.SIGCONT)
    judge(out, *first.wait(), refusal=False)


STUCK = (
    "from comad.data import loader; import time\n"
    + """
def load(self, index, real=loader.ViewDataset._load):
    if torch.utils.data.get_worker_info() and index % 8 == 3: time.sleep(1000)
    return real(self, index)
import torch
loader.ViewDataset._load = load
"""
)
KILLED = STUCK.replace("time.sleep(1000)", "os.kill(os.getpid(), 9)")


@pytest.mark.parametrize("before", [STUCK, KILLED], ids=["stuck", "killed"])
def test_a_worker_that_fails(start, command, judge, tmp_path, before):
    out, more = tmp_path / "run", ["--loader.workers=1", "--loader.deadline=2"]
    status, told = start(command(out, *more), before=before).wait()
    assert judge(out, status, told) == "refused in one line" and status == 3 and "--loader.workers 0" in told
    judge(out, *start(command(out)).wait(), refusal=False)


def test_resume_needs_the_folder_alone(start, copied, judge, whole):
    judge(copied, *start(["distill", "--run.resume", f"--run.out={copied}"]).wait(), refusal=False)


CHANGES = {
    "1 image removed": lambda path: path.unlink(),
    "1 image removed, 1 added": lambda path: path.rename(path.with_name("x.png")),
    "1 image resized": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "1 image added": lambda path: shutil.copy(path, path.with_name("x.png")),
}


@pytest.mark.parametrize(
    "words", [name if name == "1 image removed" else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)
def test_data_in_another_place_and_other_data(start, command, copied, judge, tmp_path, words):
    data = next(a for a in command(copied) if a.startswith("--data=")).partition("=")[2]
    for name in ("moved", "other"):
        shutil.copytree(data, tmp_path / name)
    CHANGES[words](tmp_path / "other" / "train" / "3.png")
    resume = ["distill", "--run.resume", f"--run.out={copied}"]
    status, told = start([*resume, f"--data={tmp_path / 'other'}"]).wait()
    assert judge(copied, status, told) == "refused in one line" and f"{words};" in told
    judge(copied, *start([*resume, f"--data={tmp_path / 'moved'}"]).wait(), refusal=False)


def test_options_that_change_the_result_are_refused_on_resume(start, copied, judge):
    resume = ["distill", "--run.resume", f"--run.out={copied}"]
    status, told = start([*resume, "--optim.base-lr=0.5"]).wait()
    assert judge(copied, status, told) == "refused in one line" and "optim.base_lr" in told
    judge(copied, *start([*resume, "--run.log-every=3"]).wait(), refusal=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS[1:])
def test_a_second_signal_ends_at_once(start, command, at_step, judge, tmp_path, number):
    out, doing = tmp_path / "run", f"[os.kill(os.getpid(), {int(number)}) for _ in range(2)]"
    status, told = start(command(out), before=at_step(6, doing)).wait()
    assert status == 130 and "ended at once" in told and "Traceback" not in told
    judge(out, *start(command(out)).wait(), refusal=False)


def change(path, **parts):
    """Write a checkpoint that is whole, and holds other things."""
    stored = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in {**stored, **parts}.items() if value is not None}, path)


WRONG = {
    "a step before the first": lambda path: change(path, step=-5),
    "a step after the last": lambda path: change(path, step=10**12),
    "a step that is none": lambda path: change(path, step="6"),
    "no generators": lambda path: change(path, random=None),
    "other generators": lambda path: change(path, random={"torch": torch.zeros(3)}),
    "another version": lambda path: change(path, module=None, model={}),
    "other shapes": lambda path: change(path, module={name: torch.zeros(7) for name in torch.load(path)["module"]}),
    "no moments": lambda path: change(path, optimizer={"state": {}, "param_groups": []}),
    "an identity that is none": lambda path: change(path, identity="{"),
    "a list": lambda path: torch.save([1, 2], path),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_a_checkpoint_that_is_whole_and_wrong(start, command, copied, judge, kind):
    WRONG[kind](copied / "checkpoints" / "step-00000006.pt")
    status, told = start(command(copied)).wait()
    judge(copied, status, told, refusal=False)
    assert "step-00000006.pt" in told


ABSURD = {
    "log.jsonl": ['{"step": 1, "loss": 1e400, "images_per_s": -1}\n', '{"step": 1e99}\n', '{"step": "2"}\n'],
    "teacher-cache/*/layout.json": ['{"patches": ["float32", [1000000000000]]}', '{"patches": ["eval", [-1]]}', "null"],
    "facts.json": ['{"images": {"train": -1}}', "[]"],
    "config.yaml": ["optim: {epochs: 1e308}\n", "teachers: 3\n"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in ABSURD.items() for text in texts])
def test_absurd_numbers_in_state(start, command, copied, judge, name, text):
    for path in copied.glob(name):
        path.write_text(text)
    judge(copied, *start(command(copied)).wait(), refusal=False)


HOSTILE = {
    "deep": "[" * 5000,
    "deep mapping": "{a: " * 5000,
    "bomb": "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "binary": "\x00\x01\x02",
    "object": "!!python/object/apply:os.system ['echo hostile']",
    "list": "[1, 2]",
    "word": "hello",
    "number": "optim: {epochs: .nan}",
    "large number": "optim: {batch_size: 99999999999999999999999999999999}",
    "negative": "run: {log_every: -5}",
    "no text": "data: {a: b}",
    "large": "x" * 2_000_000,
    "unknown": "optim: {epcohs: 3}",
}  # fmt: skip


@pytest.mark.parametrize("verb", ["distill", "pretrain"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_recipes(tmp_path, capfd, judge, verb, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(HOSTILE[kind])
    status = main([verb, f"--recipe={path}", f"--run.out={tmp_path / 'run'}"])
    told = capfd.readouterr().err
    assert judge(tmp_path, status, told) == "refused in one line" and not (tmp_path / "run").exists()


def test_what_is_unexpected_leaves_its_traceback_in_a_file(start, command, tmp_path):
    out, before = tmp_path / "run", "import comad.distillation.run as r; r.make_jobs = lambda *_: 1 / 0"
    status, told = start(command(out), before=before).wait()
    (path,) = out.glob("comad-error-*.txt")
    assert status == 70 and "Traceback" not in told and str(path) in told
    assert "ZeroDivisionError" in path.read_text()


def test_a_manifest_is_kept(stopped):
    rows = np.load(stopped / "data.npy")
    assert len(rows) == 24 and json.loads((stopped / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
