"""Programs of some ten lines that use an export without comad. They open ``photo.jpg`` where they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comad.exporting.formats import Graph


def timm(graph: Graph, folder: str, file: str) -> str:
    """By timm alone."""
    return f"""import timm
import torch
from PIL import Image

model = timm.create_model({f"local-dir:{folder}"!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
with torch.inference_mode():
{_of_timm(graph, folder)}"""


def transformers(graph: Graph, folder: str, file: str) -> str:
    """By transformers, which has timm inside."""
    if graph.labels:
        return f"""from transformers import pipeline

classify = pipeline("image-classification", model={folder!r})
for guess in classify("photo.jpg"):
    print(guess["label"], guess["score"])
"""
    features = "model(**inputs).last_hidden_state"
    if not graph.features.startswith("forward_features"):
        features = f"model.timm_model.{graph.features.format('inputs.pixel_values')}"
    return f"""import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained({folder!r}).eval()
processor = AutoImageProcessor.from_pretrained({folder!r})
inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
{_split(graph, features, "model.timm_model")}"""


def torchvision(graph: Graph, folder: str, architecture: str, layers: Sequence[str]) -> str:
    """By torchvision's own class, loaded strictly but for its classifier."""
    return f"""import torch
import torchvision
from safetensors.torch import load_file
{_PILLOW}
network = torchvision.models.get_model({architecture.partition(":")[2]!r})
setattr(network, list(network._modules)[-1], torch.nn.Identity())
network.load_state_dict(load_file({f"{folder}/model.safetensors"!r}), strict=True)
model = torch.nn.Sequential(*[getattr(network, name) for name in {list(layers)!r}]).eval()
{_pixels(graph)}image = torch.from_numpy(pixels)
with torch.inference_mode():
{_split(graph, "model(image)")}"""


def own(graph: Graph, folder: str) -> str:
    """By the class of whoever made it; its forward gives what it gave in training."""
    return f"""import torch
from safetensors.torch import load_file
{_PILLOW}
from my_network import build  # yours: what the student was built by

model = build().eval()
model.load_state_dict(load_file({f"{folder}/model.safetensors"!r}), strict=True)
{_pixels(graph)}with torch.inference_mode():
    features = model(torch.from_numpy(pixels))
"""


def state_dict(graph: Graph, folder: str, file: str) -> str:
    """By timm's own class, loaded strictly."""
    arguments = "".join(f", {key}={value!r}" for key, value in graph.model_args.items())
    return f"""import timm
import torch
{_PILLOW}
model = timm.create_model({graph.architecture!r}, num_classes={len(graph.labels)}{arguments}).eval()
model.load_state_dict(torch.load({f"{folder}/{file}"!r}, weights_only=True), strict=True)
{_pixels(graph)}image = torch.from_numpy(pixels)
with torch.inference_mode():
{_of_timm(graph, folder)}"""


def torch_export(graph: Graph, folder: str, file: str) -> str:
    """By torch alone."""
    return f"""import torch
{_PILLOW}
model = torch.export.load({f"{folder}/{file}"!r}).module()
{_pixels(graph)}with torch.inference_mode():
    {_names(graph)} = model(torch.from_numpy(pixels))
{_label(graph, folder)}"""


def onnx(graph: Graph, folder: str, file: str) -> str:
    """By ONNX Runtime, without torch."""
    return f"""import onnxruntime
{_PILLOW}
session = onnxruntime.InferenceSession({f"{folder}/{file}"!r})
{_pixels(graph)}{_names(graph)} = session.run(None, {{"pixels": pixels}})
{_label(graph, folder)}"""


def openvino(graph: Graph, folder: str, file: str) -> str:
    """By OpenVINO, without torch; in 32 bits also on CPUs where it would take 16."""
    return f"""import openvino
{_PILLOW}
model = openvino.compile_model({f"{folder}/{file}"!r}, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
{_pixels(graph)}{_names(graph)} = model(pixels).values()
{_label(graph, folder)}"""


def executorch(graph: Graph, folder: str, file: str) -> str:
    """By ExecuTorch's runtime."""
    return f"""import torch
from executorch.runtime import Runtime
{_PILLOW}
method = Runtime.get().load_program({f"{folder}/{file}"!r}).load_method("forward")
{_pixels(graph)}{_names(graph)} = method.execute([torch.from_numpy(pixels)])
{_label(graph, folder)}"""


_PILLOW = """import numpy as np
from PIL import Image
"""


def _pixels(graph: Graph) -> str:
    """One photograph as normalised pixels, by Pillow and numpy."""
    facts = graph.preprocessing
    size, mean, std = facts.size, list(facts.mean), list(facts.std)
    repeat = f".repeat({graph.batch}, 0)" if graph.batch and graph.batch > 1 else ""
    return f"""photo = Image.open("photo.jpg").convert("RGB")
sides = [{facts.shorter} * side // min(photo.size) for side in photo.size]
photo = photo.resize(sides, Image.Resampling.{facts.interpolation.upper()})
left, top = [round((side - {size}) / 2) for side in photo.size]
photo = photo.crop((left, top, left + {size}, top + {size}))
pixels = (np.asarray(photo) / 255 - {mean}) / {std}
pixels = pixels.astype(np.float32).transpose(2, 0, 1)[None]{repeat}
"""


def _names(graph: Graph) -> str:
    return ", ".join(graph.outputs) + ("," if len(graph.outputs) == 1 else "")


def _label(graph: Graph, folder: str) -> str:
    if not graph.labels:
        count = graph.batch or 1
        return f"print(feature.shape, patches.shape)  # ({count}, width), ({count}, patches, width)\n"
    where = f"{folder}/config.json"
    return f"""import json

labels = json.load(open({where!r}))["label_names"]
print(labels[int(logits[0].argmax())])
"""


def _of_timm(graph: Graph, folder: str) -> str:
    if graph.labels:
        return f"    logits = model(image)\n{_label(graph, folder)}"
    return _split(graph, f"model.{graph.features.format('image')}")


def _split(graph: Graph, features: str, model: str = "model") -> str:
    """Lines that take the image's vector and its patches from timm's features."""
    if graph.norm:
        return _normed(graph, features, model)
    if graph.num_prefix_tokens is None:
        shape = "(1, h, w, width)" if graph.channels_last else "(1, width, h, w)"
        return f"""    patches = {features}  # {shape}
    feature = patches.mean(dim={(1, 2) if graph.channels_last else (2, 3)})  # (1, width)
"""
    first = "tokens[:, 0]" if graph.pool == "cls" else "patches.mean(dim=1)"
    return f"""    tokens = {features}
    patches = tokens[:, {graph.num_prefix_tokens}:]  # (1, patches, width)
    feature = {first}  # (1, width)
"""


def _normed(graph: Graph, features: str, model: str) -> str:
    """The same of a network whose norm is behind its pooling."""
    norm = f"{model}.{graph.norm}"
    if graph.num_prefix_tokens is not None:
        return f"""    tokens = {features}
    patches = {norm}(tokens[:, {graph.num_prefix_tokens}:])  # (1, patches, width)
    feature = {model}.forward_head(tokens, pre_logits=True)  # (1, width)
"""
    rows = "maps.flatten(1, 2)" if graph.channels_last else "maps.flatten(2).mT"
    shape, end = ("[..., None, None]", ".flatten(1)") if graph.norm_of_maps else ("", "")
    patches = "[0][..., None, None]).flatten(1)[None]" if graph.norm_of_maps else ")"
    return f"""    maps = {features}
    rows = {rows}
    patches = {norm}(rows{patches}  # (1, patches, width)
    feature = {norm}(rows.mean(dim=1){shape}){end}  # (1, width)
"""
