"""The files a network can leave as. Add one: how it is written, how its own runtime opens it, how it is used."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from comad.exporting import programs
from comad.exporting.encoder import Preprocessing
from comad.models.networks import each_normalised

Arrays = list[np.ndarray]
Run = Callable[[np.ndarray], Arrays]
"""float32 pixels (B, 3, H, W), normalised → outputs, in the order of the graph."""
OPSET = 20
MAX_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What is written.

    Attributes:
        module: normalised pixels (B, 3, H, W) → a tuple of tensors.
        outputs: their names.
        preprocessing: how its pixels are made.
        batch: images per call; None: any number.
        opset: of ONNX.
        half: weights in 16 bits.
        calibration: gives normalised pixels (1, 3, H, W), by which the ranges of 8 bits are set.
        architecture, model_args: timm's name and arguments of the network; no name: timm does not know it.
        labels: names of the classes; empty: it gives features.
        num_prefix_tokens: tokens before the patches in timm's sequence; None: timm gives a map.
        channels_last: timm gives maps as (B, h, w, E).
        features: how timm's network is asked for them, with ``{}`` for pixels.
        norm: name of the network's norm behind its pooling, through which patches go too; empty: there is none.
        norm_of_maps: it takes maps, not rows.
        pool: what stands for an image: ``cls`` or ``patch``.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    preprocessing: Preprocessing
    batch: int | None = None
    opset: int = OPSET
    half: bool = False
    calibration: Callable[[], Iterator[np.ndarray]] = lambda: iter(())
    architecture: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    num_prefix_tokens: int | None = None
    channels_last: bool = False
    features: str = "forward_features({})"
    norm: str = ""
    norm_of_maps: bool = False
    pool: str = "cls"

    def example(self, batch: int | None = None) -> torch.Tensor:
        """Pixels of the right shape."""
        size = self.preprocessing.size
        return torch.rand(batch or self.batch or 2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def facts(self) -> str:
        """What goes into the file: pre-processing, and the names of the classes if there are any, as JSON."""
        return json.dumps(self.preprocessing.as_dict() | ({"labels": self.labels} if self.labels else {}))


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way out.

    Attributes:
        file: what is opened, inside the exported folder; ``{}`` becomes ``_fp16`` or nothing.
        needs: modules that must be there.
        extra: of comad, that installs them.
        write: makes the file; its folder exists. None: it is a part of timm's folder.
        open: a file, the number of threads (0: all) → what runs it, by the runtime that users have.
        program: the folder, and the file in it → the program that uses it without comad.
        exact: its outputs equal the network's up to rounding; else it is quantised.
        half: it can be written with 16-bit weights.
        fixed: it takes a fixed number of images per call.
        threads: its runtime can be told how many to use.
        timm: it needs a network that timm builds by name.
        note: for the table.
    """

    file: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    write: Callable[[Graph, Path], None] | None
    open: Callable[[Graph, Path, int], Run]
    program: Callable[[Graph, str, str], str]
    exact: bool = True
    half: bool = True
    fixed: bool = False
    threads: bool = True
    timm: bool = False
    note: Callable[[Graph], str] = lambda graph: ""

    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def path(self, half: bool) -> str:
        """The file inside the folder."""
        return self.file.format("_fp16" if half and self.half else "")


def without_telemetry() -> None:
    """Let openvino and nncf run as where ``openvino-telemetry`` is not installed: nothing is sent from this process."""
    sys.modules["openvino_telemetry"] = ModuleType("openvino_telemetry")  # empty: what they import from it is missing


def exported_program(graph: Graph) -> torch.export.ExportedProgram:
    """Trace the network by torch.export. Places in source files, which torch keeps, are taken out."""
    dynamic = None if graph.batch else ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    program = torch.export.export(graph.module, (graph.example(),), dynamic_shapes=dynamic)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta = {
                key: value for key, value in node.meta.items() if key not in ("stack_trace", "nn_module_stack")
            }
    return program


def _attention_over_units(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, scale: float | None = None, **options: Any
) -> Any:
    """Attention as matrix products where torch's ONNX exporter has none: more than four axes, as Hiera's mask units."""
    if query.ndim == 4 or more or options:
        return NotImplemented
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return (query * factor @ key.transpose(-2, -1)).softmax(-1) @ value


def onnx_model(graph: Graph) -> Any:
    """The network as an ``onnx.ModelProto`` with its pre-processing among its metadata."""
    attention: dict[Any, Any] = {torch.ops.aten.scaled_dot_product_attention.default: _attention_over_units}
    with contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        exported = torch.onnx.export(
            exported_program(graph).run_decompositions(attention),
            dynamo=True,
            input_names=["pixels"],
            output_names=list(graph.outputs),
            opset_version=graph.opset,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if batch and dim.dim_param == batch:
                dim.dim_param = "batch"
    for part in [*model.graph.node, *values, *model.graph.initializer, model.graph]:
        del part.metadata_props[:]  # places in source files
        part.doc_string = ""
    _set_facts(model, graph)
    return model


def _set_facts(model: Any, graph: Graph) -> None:
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"preprocessing": graph.facts()})
    model.producer_name = "comad"


def _write_onnx(graph: Graph, path: Path) -> None:
    import onnx

    model = onnx_model(graph)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_int8(graph: Graph, path: Path) -> None:
    import onnx

    model = _quantised(onnx_model(graph), graph, lambda pixels: {"pixels": pixels})
    _set_facts(model, graph)
    onnx.save(model, path)


def _quantised(model: Any, graph: Graph, transform: Callable[[np.ndarray], Any]) -> Any:
    """Post-training quantisation by NNCF; the smoothing that Vision Transformers need where there is attention."""
    without_telemetry()
    nncf, advanced = (importlib.import_module(name) for name in ("nncf", "nncf.quantization.advanced_parameters"))
    samples = list(graph.calibration())
    attention = any(name.rpartition(".")[2] == "attn" for name, _ in graph.module.named_modules())
    with contextlib.redirect_stdout(sys.stderr), _quiet("nncf"):
        return nncf.quantize(
            model,
            nncf.Dataset(samples, transform),
            preset=nncf.QuantizationPreset.MIXED,  # Swish and GELU are not symmetric
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            subset_size=len(samples),
            advanced_parameters=advanced.AdvancedQuantizationParameters(
                overflow_fix=advanced.OverflowFix.ENABLE,  # CPUs with AVX2 alone add up pairs of products in 16 bits
                activations_quantization_params=advanced.QuantizationParameters(
                    per_channel=False
                ),  # all that ONNX Runtime runs
            ),
        )


def _open_onnx(graph: Graph, path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: [np.asarray(value) for value in session.run(None, {"pixels": pixels})]


def _openvino() -> Any:
    without_telemetry()
    return importlib.import_module("openvino")


def _openvino_model(graph: Graph) -> Any:
    openvino = _openvino()
    model = openvino.Core().read_model(onnx_model(graph).SerializeToString())
    model.set_rt_info(graph.facts(), ["comad", "preprocessing"])
    return model


def _write_openvino(graph: Graph, path: Path) -> None:
    openvino = _openvino()
    whole = Graph(**{**vars(graph), "module": _whole(graph.module)}) if graph.half else graph
    openvino.save_model(_openvino_model(whole), path, compress_to_fp16=graph.half)


def _whole(module: nn.Module) -> nn.Module:
    """16-bit weights for a computation in 32 bits, which is what OpenVINO makes of them."""
    return copy.deepcopy(module).float()


def _write_openvino_int8(graph: Graph, path: Path) -> None:
    openvino = _openvino()
    model = _quantised(_openvino_model(graph), graph, lambda pixels: pixels)
    model.set_rt_info(graph.facts(), ["comad", "preprocessing"])
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(graph: Graph, path: Path, threads: int) -> Run:
    openvino = _openvino()
    limit = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **limit})
    return lambda pixels: [np.array(value) for value in compiled(pixels).values()]


def _write_program(graph: Graph, path: Path) -> None:
    torch.export.save(exported_program(graph), path, extra_files={"preprocessing.json": graph.facts()})


def _open_program(graph: Graph, path: Path, threads: int) -> Run:
    return by_torch(torch.export.load(path).module(), threads)


def by_torch(function: Callable[[torch.Tensor], Sequence[torch.Tensor]], threads: int) -> Run:
    """Run a function of tensors on so many threads; 0: as many as torch has."""

    def run(pixels: np.ndarray) -> Arrays:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with torch.no_grad():
                return [output.float().numpy() for output in function(torch.from_numpy(pixels))]
        finally:
            torch.set_num_threads(before)

    return run


def _write_executorch(graph: Graph, path: Path) -> None:
    with _quiet(""), contextlib.redirect_stdout(sys.stderr):
        xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        exir = importlib.import_module("executorch.exir")
        fixed = Graph(**{**vars(graph), "batch": graph.batch or 1})
        lowered = exir.to_edge_transform_and_lower(exported_program(fixed), partitioner=[xnnpack.XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    path.with_name("preprocessing.json").write_text(graph.facts() + "\n", encoding="utf-8")


def _open_executorch(graph: Graph, path: Path, threads: int) -> Run:
    method = importlib.import_module("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    return by_torch(lambda pixels: [torch.as_tensor(value) for value in method.execute([pixels])], threads)


def _write_state_dict(graph: Graph, path: Path) -> None:
    """The tensors of timm's folder, which is written first, as torch saves them."""
    from safetensors.torch import load_file

    torch.save(load_file(path.parent.parent / "model.safetensors"), path)
    path.with_name("preprocessing.json").write_text(graph.facts() + "\n", encoding="utf-8")


def _open_state_dict(graph: Graph, path: Path, threads: int) -> Run:
    import timm

    model = timm.create_model(graph.architecture, num_classes=len(graph.labels), **graph.model_args).eval()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return by_torch(lambda pixels: timm_outputs(model, pixels, graph), threads)


def _open_timm(graph: Graph, path: Path, threads: int) -> Run:
    import timm

    model = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    return by_torch(lambda pixels: timm_outputs(model, pixels, graph), threads)


def timm_outputs(model: Any, pixels: torch.Tensor, graph: Graph) -> list[torch.Tensor]:
    """What a timm network says, in the terms of the graph."""
    if graph.labels:
        return [model(pixels)]
    if graph.features.startswith("forward_features"):
        return _split(model.forward_features(pixels), graph, model)
    norm = "norm=True" in graph.features
    return _split(model.forward_intermediates(pixels, indices=1, norm=norm, intermediates_only=True)[0], graph, model)


def _split(features: torch.Tensor, graph: Graph, model: Any) -> list[torch.Tensor]:
    """The image's vector and its patches, from the sequence or map of timm's model."""
    norm = model.get_submodule(graph.norm) if graph.norm else None
    if graph.num_prefix_tokens is None:
        axes = (1, 2) if graph.channels_last else (2, 3)
        patches = features.flatten(*axes)
        patches = patches if graph.channels_last else patches.transpose(1, 2)
        vectors = patches.mean(dim=1)
        return [vectors, patches] if norm is None else [each_normalised(norm, x) for x in (vectors, patches)]
    patches = features[:, graph.num_prefix_tokens :]
    if norm is not None:
        return [model.forward_head(features, pre_logits=True), norm(patches)]
    return [features[:, 0] if graph.pool == "cls" else patches.mean(dim=1), patches]


def _open_transformers(graph: Graph, path: Path, threads: int) -> Run:
    from transformers import AutoModel, AutoModelForImageClassification

    with _quiet("transformers"), contextlib.redirect_stderr(io.StringIO()):  # progress bars of a second
        kind = AutoModelForImageClassification if graph.labels else AutoModel
        model = kind.from_pretrained(path.parent, local_files_only=True).eval()
    if graph.labels:
        return by_torch(lambda pixels: [model(pixel_values=pixels).logits], threads)
    inner = getattr(model, "timm_model", None)
    if inner is not None and not graph.features.startswith("forward_features"):
        return by_torch(lambda pixels: timm_outputs(inner, pixels, graph), threads)
    return by_torch(lambda pixels: _split(model(pixel_values=pixels).last_hidden_state, graph, inner), threads)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a library speak of errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _batch(graph: Graph) -> str:
    return f"batch {graph.batch}" if graph.batch else "any batch"


FORMATS: dict[str, Format] = {
    "timm": Format(file="model.safetensors", write=None, open=_open_timm, program=programs.timm, timm=True),
    "transformers": Format(
        file="model.safetensors",
        needs=("transformers",),
        extra="transformers",
        write=None,
        open=_open_transformers,
        program=programs.transformers,
        timm=True,
    ),
    "state-dict": Format(
        file="state_dict/model{}.pth",
        write=_write_state_dict,
        open=_open_state_dict,
        program=programs.state_dict,
        timm=True,
    ),
    "torch-export": Format(
        file="torch_export/model{}.pt2",
        write=_write_program,
        open=_open_program,
        program=programs.torch_export,
        note=_batch,
    ),
    "onnx": Format(
        file="onnx/model{}.onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        write=_write_onnx,
        open=_open_onnx,
        program=programs.onnx,
        note=lambda graph: f"opset {graph.opset}, {_batch(graph)}",
    ),
    "int8": Format(
        file="onnx/model_int8.onnx",
        needs=("onnx", "onnxscript", "onnxruntime", "nncf"),
        extra="int8",
        write=_write_int8,
        open=_open_onnx,
        program=programs.onnx,
        exact=False,
        half=False,
        note=lambda graph: f"opset {graph.opset}, {_batch(graph)}",
    ),
    "openvino": Format(
        file="openvino{}/openvino_model.xml",
        needs=("openvino", "onnx", "onnxscript"),
        extra="openvino",
        write=_write_openvino,
        open=_open_openvino,
        program=programs.openvino,
        note=_batch,
    ),
    "openvino-int8": Format(
        file="openvino_int8/openvino_model.xml",
        needs=("openvino", "onnx", "onnxscript", "nncf"),
        extra="openvino",
        write=_write_openvino_int8,
        open=_open_openvino,
        program=programs.openvino,
        exact=False,
        half=False,
        note=_batch,
    ),
    "executorch": Format(
        file="executorch/model{}.pte",
        needs=("executorch",),
        extra="executorch",
        write=_write_executorch,
        open=_open_executorch,
        program=programs.executorch,
        fixed=True,
        threads=False,
        note=lambda graph: f"XNNPACK, batch {graph.batch or 1}",
    ),
}
"""Name of the format → how it is written, opened and used."""
