import importlib.util
import json
import os
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import comad
from comad.data.folders import FolderImages
from comad.data.load import load_images
from comad.data.transforms import evaluation_view
from comad.exporting import fidelity, formats
from comad.exporting.command import export, export_model
from comad.exporting.config import ExportConfig
from comad.exporting.encoder import Encoder
from comad.exporting.finetuned import export_classifier
from comad.exporting.formats import FORMATS
from comad.exporting.source import Source
from comad.models.teachers import load_teacher

from .conftest import ARGS, CARD, make_student

LIGHT = ("timm", "transformers", "state-dict", "torch-export", "onnx")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Latencies from few runs: their figures are not tested."""
    monkeypatch.setattr(fidelity, "SECONDS", 0.0)


def need(*names):
    """Skip where the formats' packages are missing."""
    for name in names:
        for package in FORMATS[name].needs:
            pytest.importorskip(package)


def exported(run, *names, **options):
    """Export a run, and read what was measured."""
    need(*names)
    text = export(ExportConfig(backbone=run.folder, to=names, images=16, calibration=16, **options))
    out = Path(options.get("out", f"{run.folder}/export"))
    return text, out, {row["format"]: row for row in json.loads((out / "exports.json").read_text())["exports"]}


def program_of(text, name):
    """The program that the command printed for a format."""
    return text.split(f"\n{name}:\n\n")[1].split("\n\n\n")[0].split("\n\n" + "-")[0]


def write_photo(folder):
    """A photograph that is not square."""
    noise = np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((60, 40), Image.Resampling.BICUBIC).save(folder / "photo.jpg", quality=95)


def feature_of(student, path):
    """What comad itself makes of a photograph."""
    image = FolderImages("photo", path.parent, [path.name], None).load(0)
    return student(evaluation_view(image, 16, 0.875)[None].float() / 255).cls[0].numpy()


def test_all_formats_of_a_run_agree_with_its_student(tiny_run):
    text, out, rows = exported(tiny_run, *LIGHT)
    assert set(rows) == set(LIGHT)
    for row in rows.values():
        assert row["sound"] and row["max_difference"] <= 1e-4 and row["cosine"] > 0.9999 and row["images"] > 0
        assert row["bytes"] == (out / row["file"]).stat().st_size
        assert row["ms_one_thread"] > 0 and row["ms_all_threads"] > 0
    assert rows["onnx"]["note"] == "opset 20, any batch"
    assert json.loads((Path(tiny_run.folder) / "scoreboard.json").read_text())["exports"] == list(rows.values())
    assert json.loads((out / "config.json").read_text())["comad"]["exports"] == list(rows.values())
    card = huggingface_hub.ModelCard((out / "README.md").read_text())
    assert card.data.license == "apache-2.0" and card.data.library_name == "timm"
    assert all(f"`{row['file']}`" in card.text for row in rows.values())
    train = len(load_images(tiny_run.data).train)
    assert f"images: {train} train, " in card.text
    assert not list(Path(tiny_run.folder).glob(".*"))
    assert "PyTorch" in text


def test_programs_run_without_comad_and_onnx_without_torch(tiny_run, tmp_path, monkeypatch, run_without):
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path)
    text, _, _ = exported(tiny_run, *LIGHT, out="exported")
    own = feature_of(tiny_run.student, tmp_path / "photo.jpg")
    show = "\nimport numpy as np\nprint('FEATURE', *np.asarray(feature)[0])\n"
    by_torch = "".join(
        text.split(f"\n{name}:\n\n")[1].split("\n\n" + following)[0] + show
        for name, following in zip(LIGHT[:4], [f"{name}:" for name in LIGHT[1:]], strict=True)
    )
    onnx = text.split("\nonnx:\n\n")[1] + show
    printed = run_without(by_torch, tmp_path, ("comad",)) + run_without(onnx, tmp_path, ("comad", "torch", "timm"))
    features = [np.array(line.split()[1:], float) for line in printed.splitlines() if line.startswith("FEATURE")]
    assert len(features) == len(LIGHT)
    for feature in features:
        np.testing.assert_allclose(feature, own, atol=0.02)  # libraries resize to pixels that differ in the last bit


def test_a_fixed_batch_and_an_opset(tiny_run):
    onnx = pytest.importorskip("onnx")
    text, out, rows = exported(tiny_run, "onnx", "torch-export", batch=3, opset=21)
    model = onnx.load(out / "onnx/model.onnx")
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 16, 16]
    assert [entry.version for entry in model.opset_import if not entry.domain] == [21]
    assert rows["onnx"]["note"] == "opset 21, batch 3" and "repeat(3, 0)" in text


def test_any_batch_runs_and_the_file_knows_its_pixels(tiny_run):
    need("onnx")
    import onnxruntime

    _, out, _ = exported(tiny_run, "onnx")
    session = onnxruntime.InferenceSession(out / "onnx/model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    for count in (1, 5):
        feature, patches = session.run(None, {"pixels": np.zeros((count, 3, 16, 16), np.float32)})
        assert feature.shape == (count, 24) and patches.shape == (count, 16, 24)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert facts["size"] == 16 and facts["shorter"] == 18 and facts["mean"] == [0.5, 0.4, 0.3]
    assert facts["std"] == [0.485, 0.25, 0.2] and facts["crop"] == 0.875
    with zipfile.ZipFile(exported(tiny_run, "torch-export")[1] / "torch_export/model.pt2") as archive:
        name = next(name for name in archive.namelist() if name.endswith("preprocessing.json"))
        assert json.loads(archive.read(name)) == facts


def test_files_name_no_place_on_this_machine(tiny_run):
    _, out, _ = exported(tiny_run, *LIGHT)
    package = str(Path(comad.__file__).parent).encode()
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix in (".pt2", ".pth"):
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert package not in content and b"site-packages" not in content, path


@pytest.mark.parametrize("name", ["int8", "openvino-int8"])
def test_eight_bits_are_scored_and_refused_where_they_lose(tiny_run, monkeypatch, name):
    row = exported(tiny_run, name)[2][name]
    assert row["sound"] and row["mean_cosine"] >= 0.99 and abs(row["score"] - row["own_score"]) <= 1
    assert row["scored"].startswith("kNN, ") and row["max_difference"] > 1e-3
    monkeypatch.setattr(fidelity, "INT8_COSINE", 1.1)
    with pytest.raises(ValueError, match=f"{name}: refused"):
        exported(tiny_run, name)


@pytest.mark.parametrize(
    ("change", "sound"), [({}, True), ({"score": 68.9}, False), ({"score": None}, True), ({"mean_cosine": 0.98}, False)]
)
def test_what_eight_bits_may_lose(change, sound):
    numbers = {"bytes": 1, "images": 1, "max_difference": 1.0, "cosine": 0.9, "mean_cosine": 0.995}
    row = fidelity.ExportRow(format="int8", file="f", note="", **numbers, score=69.5, own_score=70.0)
    assert fidelity.is_sound(replace(row, **change), exact=False, half=False) == sound


def test_openvino_runs_its_program_without_torch(tiny_run, tmp_path, monkeypatch, run_without):
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path)
    text, _, rows = exported(tiny_run, "openvino", out="exported")
    assert rows["openvino"]["sound"] and rows["openvino"]["max_difference"] <= 1e-4
    code = text.split("\nopenvino:\n\n")[1] + "\nprint('FEATURE', *feature[0])\n"
    printed = run_without(code, tmp_path, ("comad", "torch", "openvino_telemetry")).splitlines()[-1]
    own = feature_of(tiny_run.student, tmp_path / "photo.jpg")
    np.testing.assert_allclose(np.array(printed.split()[1:], float), own, atol=0.02)


def test_attention_over_units_is_torchs_and_leaves_others_to_the_exporter():
    query, key, value = torch.randn(3, 2, 4, 3, 5, 8)
    expected = nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(formats._attention_over_units(query, key, value), expected)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(formats._attention_over_units(query, key, value, scale=0.5), expected)
    assert formats._attention_over_units(query[0], key[0], value[0]) is NotImplemented
    assert formats._attention_over_units(query, key, value, torch.zeros(5, 5)) is NotImplemented


@pytest.mark.slow
def test_executorch(tiny_run):
    _, _, rows = exported(tiny_run, "executorch")
    assert rows["executorch"]["sound"] and rows["executorch"]["note"] == "XNNPACK, batch 1"


def test_half_precision(tiny_run):
    exported(tiny_run, "timm", "onnx")
    names = ("transformers", "state-dict", "torch-export", "onnx")
    _, out, rows = exported(tiny_run, *names, precision="fp16")
    assert set(rows) == {*names}  # timm's folder is one of 16 bits now
    assert all(row["sound"] and row["cosine"] >= 0.999 and row["note"].startswith("fp16") for row in rows.values())
    assert rows["onnx"]["file"] == "onnx/model_fp16.onnx" and (out / "onnx/model_fp16.onnx").stat().st_size < 120_000


def test_an_export_that_gives_other_features_is_refused(tiny_run, monkeypatch):
    def spoilt(graph, path):
        module = make_student()
        module.vit.norm.bias.data += 0.01
        formats._write_program(replace(graph, module=Encoder(module)), path)

    monkeypatch.setitem(FORMATS, "torch-export", replace(FORMATS["torch-export"], write=spoilt))
    with pytest.raises(ValueError, match=r"torch-export: refused.*difference [1-9]\.\de-03"):
        exported(tiny_run, "torch-export")
    assert not (Path(tiny_run.folder) / "export").exists()
    text, out, rows = exported(tiny_run, "timm", "torch-export")
    assert set(rows) == {"timm"} and "torch-export: refused" in text and not (out / "torch_export").exists()
    text, out, rows = exported(tiny_run, "torch-export", keep_failed=True)
    assert not rows["torch-export"]["sound"] and "NOT as near" in text and (out / "torch_export/model.pt2").is_file()
    assert "not as near as it should be" in (out / "README.md").read_text()


def test_a_converter_that_fails_is_told_in_one_line(tiny_run, monkeypatch):
    def failing(graph, path):
        path.write_text("half")
        raise NotImplementedError("no such operator\nTraceback")

    monkeypatch.setitem(FORMATS, "torch-export", replace(FORMATS["torch-export"], write=failing))
    with pytest.raises(ValueError, match=r"^torch-export: not written, NotImplementedError: no such operator$"):
        exported(tiny_run, "torch-export")
    assert not (Path(tiny_run.folder) / "export").exists()


def test_files_of_the_same_weights_are_kept_and_of_others_not(tiny_run, tmp_path):
    out = tmp_path / "out"
    exported(tiny_run, "torch-export", out=str(out))
    _, _, rows = exported(tiny_run, "state-dict", out=str(out))
    assert set(rows) == {"torch-export", "state-dict"} and (out / "torch_export/model.pt2").is_file()
    assert "torch_export/model.pt2" in (out / "README.md").read_text()
    data = load_images(tiny_run.data)
    done = export_model(make_student(1), out, to=["state-dict"], data=data, model_args=ARGS, images=4)
    assert [row.format for row in done.rows] == ["state-dict"] and not (out / "torch_export").exists()


def test_files_have_the_modes_of_the_umask(tiny_run):
    before = os.umask(0o027)
    try:
        _, out, _ = exported(tiny_run, "timm", "state-dict", "torch-export")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert modes == {0o640} and stat.S_IMODE(out.stat().st_mode) == 0o750


def test_a_module_at_hand_and_one_that_timm_does_not_know(tiny_run, tmp_path):
    data = load_images(tiny_run.data)
    done = export_model(make_student(), tmp_path / "a", to=["timm"], data=data, model_args=ARGS, images=4)
    assert done.rows[0].sound
    assert export_model(tiny_run.folder, to=["torch-export"], images=4).folder == Path(tiny_run.folder, "export")
    backbone = make_student()
    backbone.vit.pretrained_cfg = {}
    with pytest.raises(ValueError, match="timm's name of this one is not known"):
        export_model(backbone, tmp_path / "b", to=["timm"], data=data)
    done = export_model(backbone, tmp_path / "b", to=["torch-export"], data=data, images=4)
    assert done.rows[0].sound and not (tmp_path / "b/config.json").exists()


def test_a_convolutional_network(tiny_run, tmp_path):
    need("onnx")
    backbone = load_teacher("resnet10t:random", 64).backbone
    names = ["timm", "transformers", "state-dict", "torch-export", "onnx"]
    done = export_model(backbone, tmp_path / "out", to=names, data=load_images(tiny_run.data), images=4)
    assert [row.format for row in done.rows] == names and all(row.max_difference <= 1e-4 for row in done.rows)


def test_refusals_come_before_any_work(tiny_run, tmp_path, monkeypatch):
    for options, words in (
        ({"to": ("onx",)}, "did you mean 'onnx'"),
        ({"to": ()}, "name a format"),
        ({"to": ("coreml",)}, "coreml is left out"),
        ({"to": ("timm",), "out": str(tmp_path)}, "name another folder"),
    ):
        with pytest.raises(ValueError, match=words):
            export(ExportConfig(backbone=tiny_run.folder, **options))
    with pytest.raises(ValueError, match="comad export RUN"):
        export(ExportConfig())
    with pytest.raises(ValueError, match="--images 0 is too small"):
        ExportConfig(images=0)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text("data: stamps\n")
    with pytest.raises(ValueError, match="no student yet"):
        export(ExportConfig(backbone=str(tmp_path / "begun"), to=("timm",)))
    Path(tiny_run.folder, "config.yaml").write_text("data: [1]\n")
    with pytest.raises(ValueError, match="pass --data FOLDER"):
        export(ExportConfig(backbone=tiny_run.folder, to=("timm",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'comad\[openvino\]'"):
        export(ExportConfig(backbone=tiny_run.folder, to=("openvino",)))


@pytest.mark.parametrize("pool", ["cls", "patch"])
def test_a_classifier_says_the_names_of_its_classes(tiny_run, tmp_path, monkeypatch, run_without, pool):
    need("onnx", "transformers")
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path)
    torch.manual_seed(0)
    backbone, head = make_student(), nn.Linear(24, 3)
    source = Source(backbone, CARD, ARGS, load_images(tiny_run.data))
    done = export_classifier(
        source,
        head,
        ["ant", "bee | fly", "cat"],
        "classifier",
        pool=pool,
        to=["timm", "transformers", "onnx"],
        images=8,
    )
    assert [row.format for row in done.rows] == ["timm", "transformers", "onnx"]
    assert all(row.max_difference <= 1e-4 for row in done.rows)
    tokens = backbone(torch.rand(8, 3, 16, 16))
    assert not torch.allclose(tokens.cls, tokens.patches.mean(1), atol=0.1)  # the pools differ
    card = huggingface_hub.ModelCard(Path("classifier/README.md").read_text())
    assert card.data.pipeline_tag == "image-classification"
    if pool == "cls":
        return
    by_onnx = run_without(done.text.split("\nonnx:\n\n")[1], tmp_path, ("comad", "torch")).strip()
    programs = done.text.split("\ntransformers:\n\n")[1].split("\n\nonnx:")[0]
    best = run_without(programs, tmp_path, ("comad",)).splitlines()[0]
    assert best.rsplit(" ", 1)[0] == by_onnx and by_onnx in ("ant", "bee | fly", "cat")
    with pytest.raises(ValueError, match="2 labels for a head of 3"):
        export_classifier(source, head, ["a", "b"], "x", pool=pool)


def test_nothing_is_sent_by_openvino_and_nncf(tmp_path):
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    import subprocess
    import sys

    spy = tmp_path / "openvino_telemetry"
    (spy / "backend").mkdir(parents=True)
    (spy / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nclass Telemetry: pass\n")
    (spy / "backend/__init__.py").write_text("")
    (spy / "backend/backend_ga4.py").write_text("")
    for first, expected in (("", True), ("import comad.exporting.formats as f; f.without_telemetry();", False)):
        (tmp_path / "imported").unlink(missing_ok=True)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {first} import nncf, openvino"
        source = str(Path(comad.__file__).parents[1])
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True)
        assert (tmp_path / "imported").exists() == expected
