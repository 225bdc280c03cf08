"""A fine-tuned classifier leaves: other programs load it without comad, and say its classes by their names."""

import json

import huggingface_hub
import numpy as np
import pytest
import timm
import torch

import comad
from comad.cli import main
from comad.data.load import load_images
from comad.data.loader import evaluation_batches
from comad.exporting import fidelity
from comad.exporting.finetuned import class_names
from comad.models.backbone import Pool

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
FORMATS = ("timm", "transformers", "state-dict", "onnx")
SHORT = {"epochs": 4, "batch_size": 8, "warmup_epochs": 1, "base_lr": 0.05, "workers": 0, "tensorboard": False,
         "precision": "fp32"}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fidelity, "SECONDS", 0.0)


def val_pixels(data, size):
    """Real images as every classifier sees them, before normalisation."""
    return torch.cat(list(evaluation_batches(load_images(data).val, size)))


def programs(folder):
    """Title → code in the card."""
    parts = (folder / "README.md").read_text().split("```python\n")
    titles = [part.rstrip().rsplit("\n", 1)[-1].rstrip(":") for part in parts[:-1]]
    return dict(zip(titles, [part.split("```")[0] for part in parts[1:]], strict=True))


def same_everywhere(folder, done, data, size):
    """Logits by each runtime are the trained classifier's, on real images; classes have their names."""
    import onnxruntime
    from transformers import AutoModelForImageClassification

    names = load_images(data).class_names["fine"]
    images, classifier = val_pixels(data, size), done.chosen.classifier.eval()
    with torch.no_grad():
        wanted = classifier(images)["fine"].numpy()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list(names) and config["num_classes"] == model.num_classes == len(names)
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
    facts = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert facts["labels"] == list(names) and facts["size"] == size and facts["crop"] == 0.875
    mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (images - mean) / std
    with torch.no_grad():
        theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
        found = [model(pixels).numpy(), theirs(pixel_values=pixels).logits.numpy()]
    found += session.run(None, {"pixels": pixels.numpy()})
    for logits in found:
        assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert theirs.config.id2label == dict(enumerate(names))
    return wanted


def said_by_all(folder, wanted, data, run_without):
    """Each program of the card prints the class that the classifier is surest of; ONNX's needs no torch."""
    ordered, splits = np.sort(wanted, axis=1), load_images(data)
    surest = int((ordered[:, -1] - ordered[:, -2]).argmax())
    splits.val.pil(surest).save(folder.parent / "photo.jpg", format="PNG")
    code = programs(folder)
    assert list(code) == ["With timm", "With transformers", "With state-dict", "With onnx"]
    printed = run_without(code.pop("With onnx"), folder.parent, ("comad", "torch", "timm"))
    said = run_without("\nprint('//')\n".join(code.values()), folder.parent, ("comad",)).split("//\n")
    answers = [*(text.split("\n")[0] for text in said), printed.strip()]
    assert len(answers) == 4 and answers.pop(1).startswith(f"{answers[0]} 0.")  # the pipeline adds how sure it is
    assert set(answers) == {splits.class_names["fine"][int(wanted[surest].argmax())]}


@pytest.mark.parametrize("pool", ["patch", "cls"])
def test_a_student_that_learnt_labels_says_them_everywhere(tiny_run, tmp_path, run_without, pool: Pool):
    done = comad.finetune(
        f"{tiny_run.folder}/student",
        tiny_run.data,
        tmp_path / "tuned",
        image_size=16,
        pool=pool,
        export=FORMATS,
        **SHORT,
    )
    assert done.exported == tmp_path / "tuned" / "export"
    wanted = same_everywhere(done.exported, done, tiny_run.data, 16)
    if pool == "patch":
        said_by_all(done.exported, wanted, tiny_run.data, run_without)
    card = huggingface_hub.ModelCard((done.exported / "README.md").read_text())
    assert card.data.pipeline_tag == "image-classification" and "Fine-tuned with the labels of" in card.text
    assert "- data, images: train " in card.text
    rows = json.loads((done.exported / "exports.json").read_text())["exports"]
    assert [row["format"] for row in rows] == list(FORMATS)
    assert all(row["max_difference"] <= 1e-4 and f"{row['max_difference']:.1e}" in card.text for row in rows)
    assert f"| {done.score.row.scores['finetune']:.1f} |" in card.text and "Small student" in card.text


# layers, and a norm, between pooling and classifier
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_convnext"])
def test_a_cnn_learns_with_the_head_of_its_authors(labelled_folder, tmp_path, run_without, name):
    data = str(labelled_folder)
    done = comad.finetune(f"{name}:random", data, tmp_path / "tuned", image_size=32, export=FORMATS, **SHORT)
    assert done.exported
    wanted = same_everywhere(done.exported, done, data, 32)
    if name == "mobilenetv3_small_050":
        said_by_all(done.exported, wanted, data, run_without)


def test_the_command_exports_also_when_nothing_is_left_to_train(tiny_run, tmp_path, capfd):
    arguments = ["evaluate", "finetune", f"{tiny_run.folder}/student", f"--data={tiny_run.data}", "--image-size=16"]
    arguments += ["--optim.epochs=2", "--optim.batch-size=8", "--optim.warmup-epochs=1", "--loader.workers=0"]
    arguments += ["--run.no-tensorboard", "--run.precision=fp32", f"--run.out={tmp_path / 'tuned'}"]
    assert main(arguments) == 0
    assert not (tmp_path / "tuned" / "export").exists()
    assert main([*arguments, "--run.resume", "--export", "torch-export"]) == 0
    told = capfd.readouterr().out
    assert told.count("top-1") == 2 and "torch.export.load" in told and "compared on" in told
    assert (tmp_path / "tuned/export/torch_export/model.pt2").is_file()


@pytest.mark.parametrize(
    ("backbone", "formats", "words"),
    [
        ("test_vit:random", ["onx"], "did you mean 'onnx'"),
        ("levit_128s:random", ["timm"], "no such linear classifier in timm; take --to onnx"),
    ],
)
def test_what_cannot_leave_is_told_before_training(labelled_folder, tmp_path, capfd, backbone, formats, words):
    arguments = ["evaluate", "finetune", backbone, f"--data={labelled_folder}", "--optim.batch-size=8"]
    assert main([*arguments, f"--run.out={tmp_path / 'run'}", "--image-size=224", "--export", *formats]) == 1
    assert words in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_classes_without_names_are_numbers(labelled_folder):
    splits = load_images(str(labelled_folder))
    assert class_names(splits._replace(class_names={"fine": ("a",)}), 3) == ("a", "1", "2")
