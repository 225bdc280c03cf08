import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comad.exporting.card import model_card
from comad.exporting.encoder import preprocessing_of
from comad.exporting.package import both_programs, export_backbone, timm_facts, verify_export
from comad.models.files import sha256
from comad.models.teachers import TeacherCard, load_teacher
from comad.models.timm_backbone import TimmBackbone, create_vit

from .conftest import ARGS, NAME
from .conftest import CARD as STUDENT_CARD

MEAN, STD = (0.5, 0.4, 0.3), (0.485, 0.25, 0.2)
TEACHER = TeacherCard(
    name="mae",
    source="mae.pth",
    format="mae",
    architecture="vit",
    sha256="ab12",
    depth=2,
    width=24,
    heads=2,
    patch_size=4,
    num_prefix_tokens=1,
    norm_eps=1e-6,
    pixel_mean=(0.5, 0.4, 0.3),
    pixel_std=(0.485, 0.25, 0.2),
    token_types=("patch",),
    licence="CC-BY-NC-4.0",
    params=1000,
)
CARD = replace(
    STUDENT_CARD,
    teachers=(TEACHER,),
    scores=({"name": "student", "role": "student", "knn": 61.25, "knn_coarse": None, "linear": 70.0},),
)
ALONE = """
import sys, timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
image = torch.load(sys.argv[2])
config = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    pixels = (image - mean) / std
    result = {"tokens": model.forward_features(pixels), "pooled": model(pixels), "prefix": model.num_prefix_tokens}
assert "comad" not in sys.modules
torch.save(result, sys.argv[3])
"""


def build(token_types=("cls", "patch"), **arguments):
    torch.manual_seed(0)
    arguments = {key: value for key, value in {**ARGS, **arguments}.items() if key != "img_size"}
    backbone = TimmBackbone(create_vit(NAME, 16, **arguments), MEAN, STD, token_types)
    for parameter in backbone.parameters():  # no weight left at zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone.eval()


def load_alone(folder, image, tmp_path):
    """Encode by timm in a process that does not know comad."""
    torch.save(image, tmp_path / "image.pt")
    files = [str(tmp_path / name) for name in ("image.pt", "result.pt")]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", ALONE, str(folder), *files], check=True, cwd=tmp_path, env=environment)
    return torch.load(files[1])


def test_forward_of_the_backbone_is_timms_forward_features():
    backbone, images = build(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens = backbone(images)
        expected = backbone.vit.forward_features((images - backbone.pixel_mean) / backbone.pixel_std)
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, 1:])


@pytest.mark.parametrize("token_types", [("cls", "patch"), ("patch",)])
def test_timm_alone_gives_the_same_features(tmp_path, token_types):
    backbone, image = build(token_types), torch.rand(1, 3, 16, 16)
    card = replace(CARD, token_types=token_types)
    folder = export_backbone(backbone, tmp_path / "export", model_args=ARGS, card=card)
    result = load_alone(folder, image, tmp_path)
    with torch.no_grad():
        tokens = backbone(image)
    torch.testing.assert_close(result["tokens"], torch.cat([tokens.cls[:, None], tokens.patches], 1), rtol=0, atol=1e-5)
    pooled = tokens.cls if "cls" in token_types else tokens.patches.mean(dim=1)
    torch.testing.assert_close(result["pooled"], pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"class_token": False, "global_pool": "map"},
        {"global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 2},
        {"dynamic_img_size": True},
        {"qkv_bias": False},
    ],
)
def test_other_networks(tmp_path, arguments):
    """What timm pools is the class token, or the mean of the patches, however the named architecture pools."""
    backbone, image = build(**arguments), torch.rand(1, 3, 16, 16)
    export_backbone(backbone, tmp_path / "export", model_args=ARGS | arguments, card=CARD)
    verify_export(backbone, tmp_path / "export")
    pixels = (image - backbone.pixel_mean) / backbone.pixel_std
    with torch.no_grad():
        tokens = backbone(image)
        pooled = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()(pixels)
    expected = tokens.patches.mean(dim=1) if tokens.cls is None else tokens.cls
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "test_convnext", "hiera_tiny_224"])
def test_a_network_that_pools_before_its_norm_leaves_with_the_features_that_comad_reads(tmp_path, name):
    size, arguments = {"hiera_tiny_224": 224}.get(name, 32), {}
    if name == "vit":
        size, arguments = 16, ARGS | {"class_token": False, "global_pool": "avg"}
        backbone = build(class_token=False, global_pool="avg")
    else:
        backbone = load_teacher(timm.create_model(name, num_classes=0), size, name="x").backbone
    card, image = replace(CARD, architecture=NAME if name == "vit" else name), torch.rand(1, 3, size, size)
    export_backbone(backbone, tmp_path / "export", model_args=arguments, card=card)
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    pixels = (image - backbone.pixel_mean) / backbone.pixel_std
    code = both_programs(timm_facts(backbone, preprocessing_of(backbone, 1.0)), "export")[0][1]
    lines = "\n".join(line.strip() for line in code.split("inference_mode():\n")[1].splitlines() if " = " in line)
    found = {"model": model, "image": pixels}
    with torch.inference_mode():
        tokens = backbone(image)
        exec(lines, found)
        torch.testing.assert_close(model(pixels), tokens.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["feature"], tokens.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens.patches, rtol=0, atol=1e-4)


def test_config_describes_our_weights_and_not_timms(tmp_path):
    folder = export_backbone(build(), tmp_path / "export", model_args=ARGS | {"num_classes": 0}, card=CARD)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == NAME and config["num_classes"] == 0 and config["global_pool"] == "token"
    assert not {"num_classes", "in_chans"} & set(config["model_args"])  # else transformers fails
    assert config["model_args"]["embed_dim"] == 24
    pretrained = config["pretrained_cfg"]
    assert pretrained["mean"] == list(MEAN) and pretrained["std"] == list(STD)
    assert pretrained["input_size"] == [3, 16, 16] and pretrained["num_classes"] == 0
    assert pretrained["license"] == "apache-2.0" and pretrained["crop_pct"] == 0.875
    assert not {"tag", "hf_hub_id", "url", "paper_ids", "origin_url"} & set(pretrained)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert config["comad"] == json.loads(json.dumps(asdict(replace(CARD, sha256=weights))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_enough(tmp_path, dtype):
    backbone = build()
    folder = export_backbone(backbone, tmp_path / "export", model_args=ARGS, card=CARD, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    with pytest.raises(RuntimeError, match="other tokens"):
        verify_export(backbone, folder)


def test_a_changed_weight_is_found(tmp_path):
    backbone = build()
    folder = export_backbone(backbone, tmp_path / "export", model_args=ARGS, card=CARD)
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.1.mlp.fc2.bias"][0] += 0.01  # not all of them: the norm would take a constant away
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="other tokens"):
        verify_export(backbone, folder)


def test_rounding_of_large_features_is_no_change(tmp_path):
    """Convolutions in another order of memory differ by parts of the largest feature, which may be large."""
    network = timm.create_model("test_resnet", num_classes=0)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    torch.nn.init.constant_(norms[-1].weight, 1e5)
    backbone = load_teacher(network.to(memory_format=torch.channels_last), 64, name="x").backbone
    folder = export_backbone(
        backbone, tmp_path / "export", model_args={}, card=replace(CARD, architecture="test_resnet")
    )
    assert (folder / "model.safetensors").is_file()


def test_a_failed_export_leaves_nothing_and_keeps_the_earlier_one(tmp_path):
    backbone = build()
    folder = export_backbone(backbone, tmp_path / "export", model_args=ARGS, card=CARD)
    before = (folder / "config.json").read_text()
    with pytest.raises(RuntimeError):
        export_backbone(backbone, folder, model_args=ARGS | {"embed_dim": 48}, card=CARD)
    assert (folder / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    export_backbone(backbone, folder, model_args=ARGS, card=replace(CARD, seed=4))
    assert json.loads((folder / "config.json").read_text())["comad"]["seed"] == 4


def test_refusals_name_the_remedy(tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(ValueError, match="name another folder"):
        export_backbone(build(), tmp_path, model_args=ARGS, card=CARD)
    with pytest.raises(ValueError, match="the student was built by"):
        export_backbone(build(), tmp_path / "x", model_args=ARGS, card=replace(CARD, architecture="vit_nano"))


def test_card_and_its_snippet(tmp_path, monkeypatch):
    folder = export_backbone(build(), tmp_path / "export", model_args=ARGS, card=CARD)
    text = (folder / "README.md").read_text()
    facts = timm_facts(build(), preprocessing_of(build(), CARD.eval_crop))
    programs = both_programs(facts, folder.name)
    assert text == model_card(replace(CARD, sha256=sha256(folder / "model.safetensors")), programs)
    for words in (
        "library_name",
        "CC-BY-NC-4.0",
        "ab12",
        "1,000,000",
        "seed 3",
        "| model | role | kNN | linear |",
        "| 61.2 | 70.0 |",
        NAME,
    ):
        assert words in text
    code = text.split("```python\n")[1].split("```")[0]
    assert code == programs[0][1]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["feature"].shape == (1, 24) and names["patches"].shape == (1, 16, 24)
