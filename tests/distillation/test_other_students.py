"""Students that are no plain Vision Transformers: they learn, go on bit for bit, are scored and leave."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import comad
from comad.cli import main
from comad.distillation import results as results_module
from comad.distillation.distiller import Distiller
from comad.exporting.command import export
from comad.exporting.config import ExportConfig
from comad.models.students import VitConfig, to_be_trained
from comad.models.teachers import load_teacher
from comad.presets import METHODS
from comad.recipes import parse_distillation
from comad.runtime.checkpoint import checkpoints

SHORT = [
    *("--optim.epochs=1", "--optim.batch-size=11", "--optim.warmup-epochs=1", "--run.precision=fp32"),
    *("--run.log-every=1", "--run.no-tensorboard", "--run.checkpoint-every=2", "--loader.workers=0"),
]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pages take most of the time of runs that are this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_module, "write_report", lambda folders: folders[0] / "report.html")
        yield


@pytest.fixture(scope="module")
def command(labelled_folder, teacher_specs):
    """A distillation of 5 steps."""

    def build(out, name, *more, size=64):
        sources = ["--preset=comad", "--data", str(labelled_folder), "--teachers", *teacher_specs]
        student = ["--student.name", name, f"--student.image-size={size}"]
        kept = f"--cache-folder={out}-outputs"  # of teachers: computed anew they may differ in the last bit
        return ["distill", *sources, *student, *SHORT, kept, f"--run.out={out}", *more]

    return build


def weights(out):
    return load_file(out / "student" / "model.safetensors")


def failure(capfd, arguments):
    assert main(arguments) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("comad: "))
    return line


def learns_and_goes_on(command, out, name, *more, **options):
    """Train, drop the end, go on, and compare; then the student that left is loaded by timm alone."""
    arguments = command(out, name, *more, **options)
    assert main(arguments) == 0
    before = weights(out)
    checkpoints(out / "checkpoints")[-1].unlink()
    assert main([*arguments, "--run.resume"]) == 0
    assert all(torch.equal(value, before[key]) for key, value in weights(out).items())
    rows = json.loads((out / "scoreboard.json").read_text())["rows"]
    assert {row["role"] for row in rows} >= {"teacher", "init_only", "student"} and rows[-1]["knn"] is not None
    if not timm.is_model(name):
        return
    start = timm.create_model(name, num_classes=0).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in before.items() if "running" not in key)
    student = timm.create_model(f"local-dir:{out / 'student'}", pretrained=True).eval()
    size = options.get("size", 64)
    assert torch.isfinite(student(torch.zeros(2, 3, size, size))).all()


@pytest.mark.parametrize(
    ("name", "preset", "more"),
    [
        ("test_resnet", "comad", ["--cache-teachers", "--loader.fixed-views=1"]),
        ("test_efficientnet", "radio", ["--optim.accumulate=2", "--run.checkpoint-every=1"]),
        ("test_convnext", "mean", ["--masking.hidden=zero"]),
    ],
)
def test_a_cnn_learns_goes_on_and_leaves(command, tmp_path, name, preset, more):
    learns_and_goes_on(command, tmp_path / "run", name, "--preset", preset, *more)


HALF = ("--optim.epochs=0.5", "--optim.warmup-epochs=0", "--run.checkpoint-every=1")
FAMILIES = {
    "resnet18": 64,
    "mobilenetv3_small_100": 64,
    "mobilenetv4_conv_small": 64,
    "efficientnet_b0": 64,
    "convnext_atto": 64,
    "fastvit_t8": 64,
    "efficientvit_b0": 64,
    "swin_tiny_patch4_window7_224": 64,
    "hiera_tiny_224": 64,
    "poolformer_s12": 64,
    "vit_small_patch16_dinov3": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_learns_goes_on_and_leaves_for_other_programs(command, tmp_path, name):
    pytest.importorskip("onnxruntime")
    size = FAMILIES[name]
    learns_and_goes_on(command, tmp_path / "run", name, "--preset", "mean", *HALF, size=size)
    formats = ("timm", "transformers", "onnx") if timm.is_model(name) else ("onnx",)
    export(ExportConfig(backbone=str(tmp_path / "run"), to=formats, images=4))
    rows = json.loads((tmp_path / "run" / "export" / "exports.json").read_text())["exports"]
    assert {row["format"] for row in rows} == set(formats) and all(row["max_difference"] <= 1e-4 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["eupe", "unic", "dune", "phi-s", "theia", "c-radio", "gram", "dmt-like"])
def test_presets_without_masks_teach_a_cnn(command, teacher_specs, tmp_path, preset):
    teachers = list(teacher_specs)
    if METHODS[preset].single_teacher:
        teachers = teachers[:1]
    if preset == "dmt-like":  # the mean of teachers of one width
        teachers[1] = teachers[0].replace("first=", "twin=", 1)
    more = ["--teachers", *teachers]
    learns_and_goes_on(command, tmp_path / "run", "test_resnet", "--preset", preset, *more)


def test_what_a_cnn_cannot_is_changed_and_said(command, tmp_path, capfd):
    arguments = [*command(tmp_path / "run", "test_resnet"), "--teacher-image-size=grid", "--split=none"]
    assert main(arguments) == 0
    told = capfd.readouterr()
    words = "test_resnet cannot leave out patches: student and teachers see whole images"
    (first,) = (line for line in (told.out + told.err).splitlines() if line.startswith(words))
    assert "--masking.hidden zero" in first and "teachers see images of their own size" in first
    recipe = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recipe["method"]["masking"]["name"] == "none" and recipe["teacher_image_size"] == "own"


@pytest.mark.parametrize(
    ("preset", "words"),
    [("tinymim", "reads blocks"), ("dmae", "left out"), ("dmjd", "left out"), ("hybrid", "reads blocks")],
)
def test_methods_that_need_more_say_so(command, teacher_specs, tmp_path, capfd, preset, words):
    more = ["--teachers", teacher_specs[0]] if METHODS[preset].single_teacher else []
    line = failure(capfd, [*command(tmp_path / "run", "test_resnet"), "--preset", preset, *more])
    assert words in line and "vit_tiny_patch16_224" in line and not (tmp_path / "run").exists()


def test_the_shape_of_the_defaults_is_that_of_vision_transformers_alone():
    student = parse_distillation(["--student.name", "resnet18"]).student
    assert student == VitConfig(name="resnet18", image_size=48)
    student = parse_distillation(["--student", "resnet18", "--student.patch-size=16"]).student
    assert student.arguments == {"output_stride": 16} and student.build().grid == (3, 3)
    assert parse_distillation(["--student.name", "test_vit"]).student.width == 96


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 2, "heads": 2}, "no --student.depth, --student.heads"),
        ({"patch_size": 5}, "--student.patch-size"),
        ({"name": "test_maxvit", "image_size": 50}, "--student.image-size"),
    ],
)
def test_shapes_that_a_network_cannot_have_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        VitConfig(**({"name": "test_resnet", "image_size": 64} | changes)).build()


def test_what_no_feature_depends_on_is_not_trained():
    student = VitConfig(name="mobilenetv3_small_050", image_size=32).build()
    assert {n.split(".")[1] for n, p in student.named_parameters() if not p.requires_grad} == {"conv_head"}
    assert student.training and all(x.sum() == 0 for n, x in student.named_buffers() if "batches_tracked" in n)


def test_a_strided_convolution_of_single_pixels_is_trained_without_harm():
    """FastViT's stem has one; with channels last torch 2.15 writes beyond its memory, and the process dies."""
    network = nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.Conv2d(16, 8, 2, stride=2))
    student = to_be_trained(network, "mine", 32)
    images = torch.rand(2, 3, 32, 32)
    for _ in range(3):
        student(images).patches.sum().backward()
    expected = nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.Conv2d(16, 8, 2, stride=2)).double()
    expected.load_state_dict(network.state_dict())
    (3 * expected(((images - student.pixel_mean) / student.pixel_std).double()).sum()).backward()
    torch.testing.assert_close(network[0].weight.grad.double(), expected[0].weight.grad, rtol=1e-4, atol=1e-3)


def test_statistics_follow_the_batches_and_scores_leave_them(small_distillation):
    small = small_distillation(METHODS["radio"])
    torch.manual_seed(0)
    student = VitConfig(name="test_resnet", image_size=32).build()
    distiller = Distiller(student, small.teachers, METHODS["radio"])
    for teacher in small.teachers:
        teacher.backbone.resample_to(1)
    before = student.network.bn1.running_mean.clone()
    outputs, masks = distiller.forward_teachers(small.teachers, small.images[:8])
    distiller.eval()
    distiller(small.images[:8], outputs, masks)
    assert torch.equal(student.network.bn1.running_mean, before)
    distiller.train()
    distiller(small.images[:8], outputs, masks)[0].backward()
    assert not torch.equal(student.network.bn1.running_mean, before)
    assert student.network.bn1.num_batches_tracked == 1


ADDING = Path(__file__).parents[2] / "docs" / "adding"


def loaded(out, spec, size=64):
    """The tokens of a grey image by what a run left."""
    return load_teacher(spec, size).backbone(torch.full((1, 3, size, size), 0.5)).patches


def test_a_module_of_your_own_from_a_file(command, tmp_path, monkeypatch):
    """docs/adding/own_student.py: named as there, it goes on, leaves its state dict, and is evaluated by a function."""
    arguments = command(tmp_path / "run", f"mine={ADDING}/own_student.py:build", "--run.checkpoint-every=2")
    assert main(arguments) == 0
    before = weights(tmp_path / "run")
    checkpoints(tmp_path / "run" / "checkpoints")[-1].unlink()
    assert main([*arguments, "--run.resume"]) == 0
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "run").items())
    monkeypatch.chdir(tmp_path / "run")
    assert loaded(tmp_path, f"mine={ADDING}/own_student.py:trained").shape == (1, 16, 48)
    card = json.loads(Path("student/config.json").read_text())
    assert card["architecture"] == "mine" and card["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"of your own.*NAME=NET.py:FUNCTION"):
        load_teacher("student")
    exported = export(ExportConfig(backbone=".", to=("onnx",), images=4))
    assert "onnx/model.onnx" in exported


class Cells(nn.Module):
    """Tokens of a class and of patches of 16 pixels, by one linear map."""

    num_prefix_tokens, has_cls = 1, True

    def __init__(self):
        super().__init__()
        self.cells, self.unused = nn.Conv2d(3, 24, 16, 16), nn.Linear(2, 2)

    def forward(self, pixels):
        patches = self.cells(pixels).flatten(2).mT
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


def hf_resnet():
    transformers = pytest.importorskip("transformers")
    shape = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetModel(transformers.ResNetConfig(**shape))


def hf_convnext() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4))


def hf_dinov2():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape))


MODULES = {
    "own": Cells,
    "timm": lambda: timm.create_model("test_resnet", num_classes=0),
    "torchvision": lambda: torchvision.models.get_model("shufflenet_v2_x0_5"),
    "transformers-map": hf_resnet,
    "transformers-map-and-norm": hf_convnext,
    "transformers-tokens": hf_dinov2,
}


@pytest.mark.parametrize(
    "kind", [name if name in ("own", "torchvision") else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
)
def test_a_module_at_hand_is_trained_in_place_and_leaves(kind, labelled_folder, teacher_specs, tmp_path):
    torch.manual_seed(0)
    module = MODULES[kind]()
    before = copy.deepcopy(module.state_dict())
    options = {"image_size": 64, "batch_size": 11, "warmup_epochs": 0, "epochs": 1, "workers": 0, "split": "none"}
    options |= {"checkpoint_every": 2}
    result = comad.distill(str(labelled_folder), list(teacher_specs), module, "radio", tmp_path / "run", **options)
    assert any(key in before and not torch.equal(x, before[key]) for key, x in module.state_dict().items())
    image = result.transform(Image.new("RGB", (80, 70), "red"))
    assert image.shape == (3, 64, 64) and not any(part.training for part in result.student.modules())
    state = weights(tmp_path / "run")
    if kind != "timm":
        left = result.student_folder
        saved = type(module).from_pretrained(left).state_dict() if kind.startswith("transformers") else state
        assert all(torch.equal(x, saved[key]) for key, x in result.student.state_dict().items())
    if kind.startswith("transformers"):
        checkpoints(tmp_path / "run" / "checkpoints")[-1].unlink()
        options |= {"resume": True}
        torch.manual_seed(0)
        comad.distill(str(labelled_folder), list(teacher_specs), MODULES[kind](), "radio", tmp_path / "run", **options)
        assert all(torch.equal(x, state[key]) for key, x in weights(tmp_path / "run").items())
    if kind not in ("own", "torchvision"):
        assert torch.isfinite(loaded(tmp_path, f"it={result.student_folder}")).all()


def test_modules_that_cannot_be_students_are_refused_at_once():
    with pytest.raises(ValueError, match="gives no map"):
        to_be_trained(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)), "mine", 8)
    with pytest.raises(ValueError, match="cannot compute on 8 pixels"):
        to_be_trained(nn.Conv2d(3, 4, 16), "mine", 8)
    with pytest.raises(ValueError, match=r"another network.*num_classes=0"):
        comad.distill(student=timm.create_model("test_resnet"), out="never")
    with pytest.raises(ValueError, match="no classifier 'resnet19'; did you mean"):
        VitConfig(name="torchvision:resnet19").build()
    with pytest.raises(ValueError, match="timm knows no model 'resnet19'"):
        VitConfig(name="resnet19").build()
    with pytest.raises(ValueError, match="cannot compute on 64 pixels"):
        VitConfig(name="torchvision:vit_b_32", image_size=64).build()


def test_torchvision_by_name_is_its_own_map_before_the_pooling(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.get_model("mobilenet_v3_small").eval()
    pooled = []
    network.classifier.register_forward_pre_hook(lambda module, given: pooled.append(given[0]))
    images = torch.rand(2, 3, 64, 64)
    student = VitConfig(name="torchvision:mobilenet_v3_small", image_size=64).build().eval()
    with torch.no_grad():
        network((images - student.pixel_mean) / student.pixel_std)
        student.network.module.load_state_dict({k: v for k, v in network.state_dict().items() if "classifier" not in k})
        tokens = student(images)
    torch.testing.assert_close(tokens.cls, pooled[0])
    assert student.grid == (2, 2) and tokens.patches.shape == (2, 4, 576)


def test_students_of_one_stride_share_a_run(command, tmp_path):
    names = ["--student", "test_resnet", "--student", "torchvision:shufflenet_v2_x0_5"]
    arguments = command(tmp_path / "run", "", *names, "--split=none")
    arguments = [*arguments[: arguments.index("--student.name")], *arguments[arguments.index("--student.name") + 2 :]]
    assert main(arguments) == 0
    assert {"test_resnet", "torchvision-shufflenet_v2_x0_5"} <= {path.name for path in (tmp_path / "run").iterdir()}
