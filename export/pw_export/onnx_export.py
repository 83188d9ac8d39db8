# SPDX-License-Identifier: Apache-2.0
"""ONNX models of the segments, for TensorRT: weights are inputs, so a model has none.

    python -m pw_export.onnx_export --out DIR [--precision bf16] [--tokens 8192]

writes those of the published networks. Nothing is computed and no weight exists: the segments are
traced on the meta device.
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
from pw_export.onnx_scatter import Writes
from pw_export.wan22_configs import DRAFT, HIGHRES, VAE
from pw_kernels.op import using
from pw_runtime.execution.decoder_segments import segments_of_decode
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.presets import PRESETS
from pw_runtime.system.atomic_files import atomic_file, atomic_folder, require_absent, write_text
from pw_runtime.types import VAE_STRIDE, DitConfig, Precision, Preset, VaeConfig

OPSET: Final = 20  # has Gelu and LayerNormalization; every TensorRT from 10.8 on takes it
SPREAD = 1024  # values that a constant of one value may have
TOKENS: Final = 8192  # of the published networks' segments; the larger resolutions take many calls


def export_onnx(
    networks: Mapping[str, DitConfig],
    precision: Precision,
    tokens: int,
    out: Path,
    say: Callable[[str], None] = print,
    decoder: tuple[VaeConfig, Preset] | None = None,
) -> None:
    """Write the models of all segments of some networks.

    Args:
        networks: by name; `out` gets a folder for each.
        precision: in which the networks' weights are stored.
        tokens: of a call.
        out: a folder that does not exist yet.
        say: takes a line for every model.
        decoder: a VAE, and the preset whose clips it decodes: its graphs are of one size.

    Raises:
        BadRequest: `out` exists.
        WriteFailed: the disk refuses.
        EngineError: as `export_segment` and `check_onnx` do.
    """
    segments = {
        f"{network}/{name}": segment
        for network, config in networks.items()
        for name, segment in segments_of(config, precision, tokens).items()
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
    """Write the checked models of segments as `out`/NAME.onnx, and what they are as index.json.

    Networks share most segments: what several names stand for is exported once.

    Args:
        segments: by name, which may be a path.
        out: a folder that does not exist yet.
        say: takes a line for every model.

    Raises as `export_onnx` does.
    """
    require_absent(out)
    made: dict[EngineSpec, bytes] = {}
    for name, segment in segments.items():
        if segment.spec in made:
            continue
        start = time.monotonic()
        model = made[segment.spec] = export_segment(segment)
        check_onnx(model, segment.spec)
        say(f"{name}: {len(model) / 1024:.0f} KiB in {time.monotonic() - start:.1f} s")
    files = {f"{name}.onnx": segment.spec for name, segment in segments.items()}
    index = {
        "made_by": _made_by(),
        "opset": OPSET,
        "models": [
            {"file": file, "sha256": hashlib.sha256(made[spec]).hexdigest(), **asdict(spec)}
            for file, spec in files.items()
        ],
    }
    size = sum(len(made[spec]) for spec in files.values())
    with atomic_folder(out, size, say) as folder:
        for file, spec in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / file) as partial:
                partial.write_bytes(made[spec])
        write_text(folder / "index.json", json.dumps(index, indent=2) + "\n")


def export_segment(segment: Segment, *, varying: bool = False) -> bytes:
    """The ONNX model of a segment.

    Its inputs and outputs have the names of the spec. The same code gives the same bytes.

    Args:
        segment: to export; its reference arithmetic is, whatever kernels are in use.
        varying: keep the named dimensions of the spec, from SMALLEST to the limit; else they have
            their limits, as in a TensorRT plan.

    Raises:
        EngineError: a package is missing, or PyTorch cannot export the segment.
    """
    spec, limits = segment.spec, dict(segment.spec.limits)
    baked = next(segment.module.buffers(), None)
    device = "meta" if baked is None else baked.device
    examples = tuple(
        torch.empty(one.sized(limits), dtype=DTYPES[one.dtype], device=device)
        for one in spec.inputs
    )
    dims = {name: torch.export.Dim(name, min=SMALLEST, max=limit) for name, limit in spec.limits}
    axes = tuple(
        {axis: dims[dim] for axis, dim in enumerate(one.shape) if isinstance(dim, str)}
        for one in spec.inputs
    )
    translations = _translations(sized=not varying)
    try:
        with _quiet(), using("reference"):
            program = torch.onnx.export(
                segment.module.eval(),
                examples,
                dynamo=True,
                verbose=False,
                input_names=[one.name for one in spec.inputs],
                output_names=[one.name for one in spec.outputs],
                dynamic_shapes=(axes,) if varying else None,
                opset_version=OPSET,
                custom_translation_table=translations,
            )
    except torch.onnx.OnnxExporterError as error:
        raise EngineError(f"PyTorch cannot export {spec.segment} to ONNX: {error}") from error
    assert program is not None
    return _signed(program.model_proto, spec)


def _translations(*, sized: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that PyTorch translates into something else than TensorRT should see.

    Those that write into parts of a tensor are among them where all sizes are known.
    """
    try:
        onnx: Any = importlib.import_module("onnx")
        op: Any = importlib.import_module("onnxscript").opset20
    except ImportError as error:
        raise EngineError(
            f'the export to ONNX needs a package ({error}): pip install "pixelwizard-runtime'
            '[tensorrt]"'
        ) from error

    def divide(x: Any, y: Any, rounding_mode: str) -> Any:
        # PyTorch's divides in fp32, which a GPU may round up to the next whole number
        assert x.dtype.is_integer(), "only whole numbers are rounded"
        assert rounding_mode == "trunc", "as ONNX divides whole numbers"
        return op.Div(x, y)

    def attend(q: Any, k: Any, v: Any, attn_mask: Any) -> Any:
        # PyTorch's multiplies q and k by a bf16 number each, which is off by up to 0.2 %
        scale = op.Constant(value_float=q.shape[-1] ** -0.5)
        scaled = op.Cast(op.Mul(op.Cast(q, to=onnx.TensorProto.FLOAT), scale), to=q.dtype)
        logits = op.Add(op.MatMul(scaled, op.Transpose(k, perm=[0, 1, 3, 2])), attn_mask)
        return op.MatMul(op.Softmax(logits, axis=-1), v)

    aten = torch.ops.aten
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        aten.div.Tensor_mode: divide,
        aten.scaled_dot_product_attention.default: attend,
    }
    return table | Writes(op).table() if sized else table


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says to everyone: no torchvision, its own deprecated calls.

    And that a dimension that several inputs have has one name.
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
    """The model with our metadata instead of PyTorch's, which has paths of the machine."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.name = spec.segment
    _spread(graph)
    for key, value in {
        "segment": spec.segment,
        "sources": spec.sources,
        "made_by": _made_by(),
    }.items():
        model.metadata_props.add(key=f"pixelwizard.{key}", value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _spread(graph: Any) -> None:
    """Write large constants of one value, such as the past before a clip, as that one value."""
    onnx: Any = importlib.import_module("onnx")
    kept, nodes = [], []
    for constant in graph.initializer:
        values = onnx.numpy_helper.to_array(constant)
        if values.size <= SPREAD or (values != values.flat[0]).any():
            kept.append(constant)
            continue
        one, shape = f"{constant.name}.value", f"{constant.name}.shape"
        kept.append(onnx.numpy_helper.from_array(values.flat[:1], one))
        kept.append(onnx.helper.make_tensor(shape, 7, [values.ndim], values.shape))  # int64
        nodes.append(onnx.helper.make_node("Expand", [one, shape], [constant.name]))
    rest = list(graph.node)
    graph.ClearField("initializer")
    graph.ClearField("node")
    graph.initializer.extend(kept)
    graph.node.extend([*nodes, *rest])


def _made_by() -> str:
    try:
        return f"pixelwizard-runtime {version('pixelwizard-runtime')}"
    except PackageNotFoundError:
        return "pixelwizard-runtime, source checkout"


def main() -> None:
    """Run `python -m pw_export.onnx_export`."""
    parser = argparse.ArgumentParser(description="Write ONNX models of the published networks.")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a call of a segment")
    parser.add_argument("--preset", choices=PRESETS, help="the decoder's graphs too, of its size")
    arguments = parser.parse_args()
    networks = {"draft": DRAFT, "highres": HIGHRES}
    decoder = (VAE, PRESETS[arguments.preset]) if arguments.preset else None
    export_onnx(networks, arguments.precision, arguments.tokens, arguments.out, decoder=decoder)


if __name__ == "__main__":
    main()
