# SPDX-License-Identifier: Apache-2.0
"""Write the ONNX models of the decoder's segments layer by layer, frame by frame.

PyTorch's exporter makes one operator of every step of the network's own code: thousands, with
tensors of the picture's size computed on the way. Here a layer is the few operators that it is,
and a model takes a fraction of a second and no memory. Tests compare both.

Frames are never joined, except in the outputs: a convolution over three of them is the sum of three
convolutions of one, and before a clip there are only those that exist. An upsampling adds its
shortcut to the results of four convolutions before it interleaves them. Both were chosen by the
scratch memory that TensorRT for RTX reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pw_export.onnx_graph import Graph, Value
from pw_kernels.attention.chunked import score_rows
from pw_runtime.execution.decoder_segments import LAST, PAST, TAPS, DecoderSegment, as_rows
from pw_runtime.models.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    ResidualBlock,
    Upsample,
    UpStage,
)


def decoder_model(segment: DecoderSegment, onnx: Any, opset: int) -> Any:
    """Return the ONNX model of a segment, with the names of its spec, made by the package `onnx`.

    Weights are inputs, or constants where they are part of the segment.
    """
    graph = Graph(onnx)
    _Writer(graph, segment).write()
    return graph.model(segment.name, opset)


class _Writer:
    """Writes one segment. A frame is a value of shape [1, C, H, W]."""

    def __init__(self, graph: Graph, segment: DecoderSegment) -> None:
        """Add the inputs of the segment, or its weights."""
        self._graph, self._part, self._spec = graph, segment.part, segment.spec
        self._names = {module: name for name, module in segment.part.net.named_modules()}
        self._inputs = {x.name: graph.input(x.name, x.sized({})) for x in segment.spec.inputs}
        baked = zip(segment.part.weights, segment.module.buffers(), strict=False)
        self._baked = {name: as_rows(name, weight) for name, weight in baked}
        self._made: dict[str, list[Value]] = {}  # kernels and scales, by the name of their weight
        self._as_stored: dict[Value, Value] = {}  # frame -> the same, [1, H, W, C]
        # Name of a convolution -> the frames before the next one, the latest last.
        self._past = {name: self._frames(name + PAST) for name in segment.part.past_in}

    def write(self) -> None:
        """Write all layers and the outputs."""
        graph = self._graph
        graph.output("out", graph.concat(list(self._layers(self._frames("x"))), 0))
        for tensor in self._spec.outputs[1:]:
            last = self._past_output(tensor.name.removesuffix(LAST), tensor.sized({})[0])
            graph.output(tensor.name, last)

    def _layers(self, frames: Sequence[Value]) -> Iterator[Value]:
        """Yield what the segment makes of its input frames, each [1, H, W, C]."""
        net, decoder = self._part.net, self._part.net.decoder
        if self._part.part == "coarse":
            (x,) = frames
            x = self._causal(decoder.conv1, self._pointwise(net.conv2, x))
            for layer in decoder.middle:
                if isinstance(layer, AttentionBlock):
                    x = self._attention(layer, x)
                else:
                    x = self._residual(layer, x)
            yield from self._stages(decoder.upsamples[:1], [x])
        elif self._part.part == "fine":
            yield from self._stages(decoder.upsamples[1:-1], frames)
        else:
            for frame in frames:
                x = self._blocks(decoder.upsamples[-1], frame)
                x = self._norm(decoder.head["0"], x, silu=True)
                yield self._stored(self._causal(decoder.head["2"], x))

    def _stages(self, stages: Iterable[nn.Module], frames: Sequence[Value]) -> Iterator[Value]:
        """Yield what stages that upsample make of frames, each [1, H, W, C].

        What a frame becomes when it is upsampled passes all other stages before the next one is.
        """
        stage, *others = stages
        assert isinstance(stage, UpStage)
        pairs = [(x, self._blocks(stage, x)) for x in frames]
        for x, h in pairs:
            for y in self._upsampled(stage, x, h):
                yield from self._stages(others, [self._frame(y)]) if others else (y,)

    def _blocks(self, stage: nn.Module, x: Value) -> Value:
        assert isinstance(stage, UpStage)
        for block in stage.upsamples:
            if isinstance(block, ResidualBlock):
                x = self._residual(block, x)
        return x

    def _upsampled(self, stage: UpStage, x: Value, h: Value) -> Iterator[Value]:
        """Yield the one or two frames that a stage makes of its input x and h, what blocks gave.

        Each is [1, 2H, 2W, C].
        """
        up, factor = stage.upsamples[-1], stage.time_factor
        assert isinstance(up, Upsample)
        frames = [h]
        if up.time_conv is not None and not self._part.first:
            frames = self._graph.split(self._causal(up.time_conv, h), 1, 2)
        for frame, index in zip(frames, range(factor - len(frames), factor), strict=True):
            yield self._doubled(up, frame, x, index * 4, factor * 4)

    def _doubled(self, up: Upsample, h: Value, x: Value, first: int, count: int) -> Value:
        """Write `upsample2x_conv` of h and `dup_up_add` of x to it, [1, 2H, 2W, C].

        The results of four convolutions, even rows' even and odd columns and then odd rows', are
        interleaved after x is added. Channel o at sub-position p gains channel (o n + p) // r of x,
        where n is the `count` of sub-positions and `first` is p of the first result.
        """
        graph, name, (_, channels, rows, columns) = self._graph, self._names[up], h.shape
        if name not in self._made:
            stored, kernel = (4, channels, 2, 2, channels), (4 * channels, channels, 2, 2)
            every = self._arranged(name + TAPS, stored, (0, 1, 4, 2, 3), kernel)
            self._made[name] = graph.split(every, 0, 4)
        conv, parts = self._names[up.resample["1"]], []
        for phase, kernel_of_phase in enumerate(self._made[name]):
            row, column = divmod(phase, 2)
            pads = (1 - row, 1 - column, row, column)
            parts.append(self._convolution(conv, h, kernel_of_phase, pads, bias=True))
        y = graph.reshape(graph.concat(parts, 1), 2, 2, channels, rows, columns)

        repeats = channels * count // x.shape[1]
        gained = [
            [(o * count + first + phase) // repeats for o in range(channels)] for phase in range(4)
        ]
        grid = (2, 2)
        if gained[0] == gained[1] and gained[2] == gained[3]:  # broadcast, without a copy
            gained, grid = gained[::2], (2, 1)
            if gained[0] == gained[1]:
                gained, grid = gained[:1], (1, 1)
        x = graph.gather(x, 1, [channel for part in gained for channel in part])
        y = graph.node("Add", y, graph.reshape(x, *grid, channels, rows, columns))
        return graph.reshape(graph.transpose(y, 3, 0, 4, 1, 2), 1, 2 * rows, 2 * columns, channels)

    def _residual(self, block: nn.Module, x: Value) -> Value:
        assert isinstance(block, ResidualBlock)
        layers = block.residual
        h = self._causal(layers["2"], self._norm(layers["0"], x, silu=True))
        h = self._causal(layers["6"], self._norm(layers["3"], h, silu=True))
        if block.shortcut is not None:
            x = self._pointwise(block.shortcut, x)
        return self._graph.node("Add", h, x)

    def _attention(self, block: AttentionBlock, x: Value) -> Value:
        """Write attention over the positions of a frame, as many rows at a time as the network."""
        graph, (_, channels, rows, columns) = self._graph, x.shape
        count = rows * columns
        qkv = self._pointwise(block.to_qkv, self._norm(block.norm, x, silu=False))
        q, k, v = graph.split(graph.reshape(qkv, 3 * channels, count), 0, 3)
        q = graph.node("Mul", graph.transpose(q, 1, 0), graph.number(channels**-0.5))
        v = graph.transpose(v, 1, 0)
        size = score_rows(count, torch.float32)
        parts = []
        for part in graph.split(q, 0, -(-count // size), size):
            scores = graph.node("MatMul", part, k, shape=(part.shape[0], count))
            scores = graph.node("Softmax", scores, axis=1)
            parts.append(graph.node("MatMul", scores, v, shape=part.shape))
        y = graph.reshape(graph.transpose(graph.concat(parts, 0), 1, 0), *x.shape)
        return graph.node("Add", x, self._pointwise(block.proj, y))

    def _norm(self, norm: nn.Module, x: Value, *, silu: bool) -> Value:
        """Write `channel_norm`."""
        assert isinstance(norm, ChannelNorm)
        graph, channels = self._graph, x.shape[1]
        name = f"{self._names[norm]}.gamma"
        if name not in self._made:
            gamma = self._arranged(name, (1, channels, 1, 1))
            self._made[name] = [graph.node("Mul", gamma, graph.number(channels**0.5))]
        length = graph.node("ReduceL2", x, graph.ints(1), shape=(1, 1, *x.shape[2:]), keepdims=1)
        x = graph.node("Div", x, graph.node("Clip", length, graph.number(1e-12)))
        x = graph.node("Mul", x, *self._made[name])
        return graph.node("Mul", x, graph.node("Sigmoid", x)) if silu else x

    def _pointwise(self, conv: nn.Module, x: Value) -> Value:
        """Write a convolution of single positions."""
        assert isinstance(conv, nn.Conv2d | nn.Conv3d)
        name, shape = self._names[conv], (conv.out_channels, conv.in_channels, 1, 1)
        if name not in self._made:
            self._made[name] = [self._arranged(f"{name}.weight", shape)]
        return self._convolution(name, x, self._made[name][0], (0, 0, 0, 0), bias=True)

    def _causal(self, conv: nn.Module, x: Value) -> Value:
        """Write a convolution of a frame and those before it, and keep the frames for the next."""
        assert isinstance(conv, CausalConv3d)
        graph, name, (taps, height, width) = self._graph, self._names[conv], conv.kernel_size
        out, channels = conv.out_channels, conv.in_channels
        if name not in self._made:
            stored = (out, taps, height, width, channels)
            kernel = (out, taps * channels, height, width)
            every = self._arranged(f"{name}.weight", stored, (0, 1, 4, 2, 3), kernel)
            self._made[name] = graph.split(every, 1, taps)
        window = [*self._past.get(name, []), x][-taps:]
        self._past[name] = window[1 - taps :]
        result, pads = None, (height // 2, width // 2) * 2
        for frame, kernel_of_tap in zip(reversed(window), reversed(self._made[name]), strict=False):
            part = self._convolution(name, frame, kernel_of_tap, pads, bias=result is None)
            result = part if result is None else graph.node("Add", result, part)
        assert result is not None
        return result

    def _convolution(
        self, name: str, x: Value, kernel: Value, pads: Sequence[int], *, bias: bool
    ) -> Value:
        channels = kernel.shape[0]
        shape = (1, channels, *x.shape[2:])
        inputs = [self._arranged(f"{name}.bias", (channels,))] if bias else []
        return self._graph.node("Conv", x, kernel, *inputs, shape=shape, pads=pads)

    def _arranged(
        self, name: str, stored: Sequence[int], order: Sequence[int] = (), shape: Sequence[int] = ()
    ) -> Value:
        """Return a weight, whose rows have the shape `stored`, permuted and in another shape.

        A weight of the segment is arranged here; one that is an input, by the model.
        """
        graph = self._graph
        if name in self._baked:
            rows = self._baked[name].reshape(tuple(stored))
            return graph.weights(
                name, rows.permute(*order).reshape(tuple(shape)) if order else rows
            )
        x = graph.reshape(self._inputs[name], *stored)
        return graph.reshape(graph.transpose(x, *order), *shape) if order else x

    def _frames(self, name: str) -> list[Value]:
        """Return the frames of an input [T, H, W, C]."""
        x = self._inputs[name]
        return [self._frame(stored) for stored in self._graph.split(x, 0, x.shape[0])]

    def _frame(self, stored: Value) -> Value:
        """Return a frame of [1, H, W, C]."""
        frame = self._graph.transpose(stored, 0, 3, 1, 2)
        self._as_stored[frame] = stored
        return frame

    def _stored(self, frame: Value) -> Value:
        """Return a frame as [1, H, W, C]."""
        if frame not in self._as_stored:
            self._as_stored[frame] = self._graph.transpose(frame, 0, 2, 3, 1)
        return self._as_stored[frame]

    def _past_output(self, name: str, count: int) -> Value:
        """Return the frames to keep of a convolution, [count, H, W, C]: zeros where none were."""
        graph, stored = self._graph, [self._stored(frame) for frame in self._past[name]]
        missing = count - len(stored)
        if missing > 0:
            stored.insert(0, graph.expand(graph.number(0.0), missing, *stored[0].shape[1:]))
        return graph.concat(stored, 0)
