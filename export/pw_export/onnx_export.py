# SPDX-License-Identifier: Apache-2.0
"""Export segments to ONNX for TensorRT, with weights as inputs, so that a model contains none.

    python -m pw_export.onnx_export --out DIR [--precision bf16] [--tokens 8192]

writes the models of the published networks. The transformers' segments are traced on the meta
device, the decoder's are written by `onnx_decoder`: nothing is computed and no weights are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, get_args

import torch

from pw_engines import DTYPES, EngineSpec
from pw_engines.engine import EngineError
from pw_engines.spec import SMALLEST
from pw_export.onnx_check import check_onnx
from pw_export.onnx_decoder import decoder_model
from pw_export.onnx_quantized import product_of_quantized
from pw_export.wan22_configs import DRAFT, HIGHRES, VAE
from pw_kernels.op import using
from pw_runtime.errors import PixelWizardError
from pw_runtime.execution.decoder_segments import DecoderSegment, segments_of_decode
from pw_runtime.execution.transformer_segments import WITH_ATTENTION, Segment, segments_of
from pw_runtime.presets import PRESETS
from pw_runtime.system.atomic_files import atomic_file, atomic_folder, require_absent, write_text
from pw_runtime.types import (
    VAE_STRIDE,
    DitConfig,
    LinearFormat,
    Precision,
    Preset,
    VaeConfig,
)

OPSET: Final = 20  # has Gelu and LayerNormalization, and TensorRT 10.8 and later support it
# Has Attention, which TensorRT for RTX has fused kernels for, and numbers of 4 bits.
LATER_OPSET: Final = 23
TOKENS: Final = 8192  # per call, of the published networks; large resolutions take many calls


def export_onnx(
    networks: Mapping[str, DitConfig],
    precision: Precision,
    tokens: int,
    out: Path,
    say: Callable[[str], None] = print,
    decoder: tuple[VaeConfig, Preset] | None = None,
    linear: LinearFormat = "exact",
) -> None:
    """Write the models of all segments of some networks.

    Args:
        networks: configs by name; `out` gets a folder for each.
        precision: precision of the networks' weights.
        tokens: maximum tokens per call.
        out: folder that does not exist yet.
        say: called with a line for every model.
        decoder: a VAE, and the preset that gives the size of its graphs.
        linear: format of the networks' large linear layers.

    Raises:
        BadRequest: `out` exists.
        WriteFailed: the disk is full or fails.
        EngineError: from `export_segment` or `check_onnx`.
    """
    segments = {
        f"{network}/{name}": segment
        for network, config in networks.items()
        for name, segment in segments_of(config, precision, tokens, linear).items()
    }
    if decoder is not None:
        config, preset = decoder
        plan = preset.highres or preset.draft
        rows, columns = plan.height // VAE_STRIDE[1], plan.width // VAE_STRIDE[2]
        parts = segments_of_decode(config, preset.decode, rows, columns)
        segments |= {f"vae/{name}": segment for name, segment in parts.items()}
    write_onnx(segments, out, say)


def write_onnx(
    segments: Mapping[str, Segment], out: Path, say: Callable[[str], None] = print
) -> None:
    """Write checked models of segments as `out`/NAME.onnx, with a description in index.json.

    Networks share most segments: segments of equal spec are exported once.

    Args:
        segments: by name, which may contain folders.
        out: folder that does not exist yet.
        say: called with a line for every model.

    Raises the errors of `export_onnx`.
    """
    require_absent(out)
    models: dict[EngineSpec, bytes] = {}
    for name, segment in segments.items():
        if segment.spec in models:
            continue
        start = time.monotonic()
        model = models[segment.spec] = export_segment(segment)
        check_onnx(model, segment.spec)
        say(f"{name}: {len(model) / 1024:.0f} KiB in {time.monotonic() - start:.1f} s")
    files = {f"{name}.onnx": segment.spec for name, segment in segments.items()}
    index = {
        "made_by": _made_by(),
        "opset": max(_opset(spec) for spec in models),
        "models": [
            {"file": file, "sha256": hashlib.sha256(models[spec]).hexdigest(), **asdict(spec)}
            for file, spec in files.items()
        ],
    }
    size = sum(len(models[spec]) for spec in files.values())
    with atomic_folder(out, size, say) as folder:
        for file, spec in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / file) as partial:
                partial.write_bytes(models[spec])
        write_text(folder / "index.json", json.dumps(index, indent=2) + "\n")


def export_segment(segment: Segment, *, varying: bool = False) -> bytes:
    """Export a segment and return the serialised ONNX model.

    Inputs and outputs have the names of the spec. The same code gives the same bytes.

    Args:
        segment: the segment; its reference arithmetic is exported, whatever kernels are selected.
        varying: keep the named dimensions of the spec dynamic, from SMALLEST to their limits; else
            fix them at their limits, as in a TensorRT plan.

    Raises:
        EngineError: a package is missing, or PyTorch cannot export the segment.
    """
    if isinstance(segment, DecoderSegment):
        return _signed(decoder_model(segment, _package("onnx"), OPSET), segment.spec)
    spec, limits = segment.spec, dict(segment.spec.limits)
    examples = tuple(
        torch.empty(tensor.sized(limits), dtype=DTYPES[tensor.dtype], device="meta")
        for tensor in spec.inputs
    )
    dims = {name: torch.export.Dim(name, min=SMALLEST, max=limit) for name, limit in spec.limits}
    axes = tuple(
        {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for tensor in spec.inputs
    )
    opset = _opset(spec)
    translations = _translations(opset)
    try:
        with _quiet(), using("reference"):
            program = torch.onnx.export(
                segment.module.eval(),
                examples,
                dynamo=True,
                verbose=False,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=(axes,) if varying else None,
                opset_version=opset,
                custom_translation_table=translations,
            )
    except torch.onnx.OnnxExporterError as error:
        raise EngineError(f"PyTorch cannot export {spec.segment} to ONNX: {error}") from error
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        if node.op_type == "Attention":  # TensorRT takes one output and no defaults
            del node.output[1:]
            needed = [attribute for attribute in node.attribute if attribute.name == "scale"]
            del node.attribute[:]
            node.attribute.extend(needed)
    return _signed(model, spec)


def _opset(spec: EngineSpec) -> int:
    """Return the opset of a segment's model."""
    later = spec.segment in WITH_ATTENTION or any(x.dtype == "fp4" for x in spec.inputs)
    return LATER_OPSET if later else OPSET


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return translations of operators that replace those of PyTorch, for TensorRT's sake."""
    onnx, onnxscript = _package("onnx"), _package("onnxscript")
    op = getattr(onnxscript, f"opset{opset}")

    def divide(x: Any, y: Any, rounding_mode: str) -> Any:
        # PyTorch's translation divides in fp32, which a GPU may round up to the next integer
        assert x.dtype.is_integer(), "only integers are rounded"
        assert rounding_mode == "trunc", "the rounding of ONNX's integer division"
        return op.Div(x, y)

    def attend(q: Any, k: Any, v: Any, attn_mask: Any = None) -> Any:
        # PyTorch's translation scales q and k by a bf16 factor each, which is off by up to 0.2 %;
        # so does TensorRT with the scale of Attention, even where it is the default
        scale = op.Constant(value_float=q.shape[-1] ** -0.5)
        scaled = op.Cast(op.Mul(op.Cast(q, to=onnx.TensorProto.FLOAT), scale), to=q.dtype)
        if attn_mask is None:  # over the tokens of a clip: too many for a matrix of logits
            return op.Attention(scaled, k, v, scale=1.0)[0]
        logits = op.Add(op.MatMul(scaled, op.Transpose(k, perm=[0, 1, 3, 2])), attn_mask)
        return op.MatMul(op.Softmax(logits, axis=-1), v)

    aten = torch.ops.aten
    return {
        aten.div.Tensor_mode: divide,
        aten.scaled_dot_product_attention.default: attend,
        torch.ops.pw.quantized_product.default: product_of_quantized(onnx, onnxscript),
    }


def _package(name: str) -> Any:
    """Import a package that the export needs. Raises EngineError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(
            f'the export to ONNX needs a package ({error}): pip install "pixelwizard-runtime[onnx]"'
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own noise.

    It logs that torchvision is missing, and warns of deprecated calls of its own and of dimensions
    that several inputs share.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: .* will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(level)


def _signed(model: Any, spec: EngineSpec) -> bytes:
    """Serialise the model with our metadata instead of PyTorch's, which contain local paths."""
    graph = model.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.name = spec.segment
    for key, value in {
        "segment": spec.segment,
        "sources": spec.sources,
        "made_by": _made_by(),
    }.items():
        model.metadata_props.add(key=f"pixelwizard.{key}", value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _made_by() -> str:
    try:
        return f"pixelwizard-runtime {version('pixelwizard-runtime')}"
    except PackageNotFoundError:
        return "pixelwizard-runtime, source checkout"


def main() -> None:
    """Run `python -m pw_export.onnx_export`."""
    parser = argparse.ArgumentParser(description="Write ONNX models of the published networks.")
    parser.add_argument("--out", type=Path, required=True, help="folder that must not exist yet")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="maximum tokens per call")
    parser.add_argument("--preset", choices=PRESETS, help="also export the decoder, for its size")
    arguments = parser.parse_args()
    networks = {"draft": DRAFT, "highres": HIGHRES}
    decoder = (VAE, PRESETS[arguments.preset]) if arguments.preset else None
    try:
        export_onnx(networks, arguments.precision, arguments.tokens, arguments.out, decoder=decoder)
    except PixelWizardError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
