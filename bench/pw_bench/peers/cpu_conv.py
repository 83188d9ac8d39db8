# SPDX-License-Identifier: Apache-2.0
"""Our C++ for CPUs beside oneDNN: single convolutions, and whole decodes, on this CPU.

    OMP_NUM_THREADS=1 pw bench cpu-conv --out bench/results/NAME.json

Convolutions in turns within one process, on normally distributed numbers, with their errors against
fp64. Decodes of a random latent in a process for every sample, in turns, with process memory; the
built-in model's decoder with its trained weights, the others with random ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.e2e.weights import MEDIUM_VAE
from pw_bench.measure.environment import envelope, identify
from pw_bench.peers.subprocess_ab import Run, figures_of, ratios_of, run_in_turns, serve
from pw_bench.peers.vae import our_decode, to_bytes
from pw_bench.result_sections import OutputDifference, Ratio
from pw_bench.results import Figure, Result
from pw_export.nano import NANO_VAE
from pw_export.nano.train_vae import VAE
from pw_export.nano.weights import TRAINED, read_weights
from pw_kernels import causal_conv3d
from pw_kernels.cpu_library import CPU_OPERATIONS
from pw_kernels.op import Implementation, using
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.errors import BadRequest
from pw_runtime.models import VaeDecoder
from pw_runtime.system.cpu_kernels import open_cpu_kernels
from pw_runtime.types import VAE_STRIDE, TilingConfig, VaeConfig

ONEDNN: Final = "onednn"
WINOGRAD: Final = "winograd"
_AS_CPU: Final[Mapping[str, Implementation]] = dict.fromkeys(CPU_OPERATIONS, "cpu")
# Channels, filters, frames, rows, columns of the result: layers of the decoders below, and of the
# published one on small pictures
CONVOLUTIONS: Final = (
    (16, 16, 4, 64, 128),
    (16, 12, 4, 64, 128),
    (32, 32, 4, 128, 224),
    (64, 64, 1, 16, 16),
    (64, 64, 4, 128, 224),
    (128, 128, 4, 64, 112),
    (256, 128, 4, 64, 112),
    (256, 256, 4, 32, 56),
    (512, 512, 2, 24, 32),
    (1024, 1024, 2, 24, 32),
)
_TRAINED: Final = "trained nano"
_CONFIGS: Final[Mapping[str, VaeConfig]] = {
    _TRAINED: VAE,
    "small": NANO_VAE,
    "larger": MEDIUM_VAE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """A decoder, the sizes of its clip in pixels and frames, and its number of bands."""

    decoder: str
    width: int
    height: int
    frames: int
    strips: int = 1

    @property
    def name(self) -> str:
        """Name in figures."""
        return f"{self.decoder} {self.width}x{self.height}x{self.frames}"

    @property
    def latent(self) -> Tensor:
        """Random latent [48, T, h, w]."""
        t, h, w = VAE_STRIDE
        grid = ((self.frames - 1) // t + 1, self.height // h, self.width // w)
        return torch.randn(48, *grid, generator=torch.Generator().manual_seed(1))


DECODES: Final = (
    DecodeWork(decoder=_TRAINED, width=256, height=128, frames=17),
    DecodeWork(decoder=_TRAINED, width=1280, height=704, frames=61, strips=4),
    DecodeWork(decoder="small", width=448, height=256, frames=13),
    DecodeWork(decoder="larger", width=896, height=512, frames=9, strips=2),
)


def measure_cpu_conv(
    rounds: int,
    *,
    convolutions: Iterable[tuple[int, int, int, int, int]] = CONVOLUTIONS,
    decodes: Iterable[DecodeWork] = DECODES,
    say: Callable[[str], None],
) -> Result:
    """Measure both, with `rounds` samples of each. Raises BadRequest where the C++ cannot run."""
    if reason := open_cpu_kernels(say):
        raise BadRequest("our C++ for CPUs cannot run here", got=reason, do="see `pw doctor`")
    identity = identify(torch.device("cpu"))
    figures: list[Figure] = []
    ratios: list[Ratio] = []
    differences: list[OutputDifference] = []
    for sizes in convolutions:
        say(f"convolution {sizes}")
        _add_convolution(sizes, rounds, figures, ratios, differences)
    for work in decodes:
        say(f"decode {work.name}")
        trials = run_in_turns(__name__, (ONEDNN, WINOGRAD), work, rounds)
        ours, other = (f"{work.name} {name}" for name in (WINOGRAD, ONEDNN))
        added = figures_of({f"{work.name} {name}": trial for name, trial in trials.items()})
        figures += added
        ratios += ratios_of(added, ours, (other,))
        levels = [to_bytes(trials[name].output).int() for name in (WINOGRAD, ONEDNN)]
        change = (levels[0] - levels[1]).abs()
        differences.append(
            OutputDifference(
                side=ours,
                against=other,
                max_abs=float(change.max()),
                unit="levels of 255",
                share=change.ne(0).float().mean().item(),
            )
        )
    scope = {
        "words": "3x3x3 convolutions on random numbers, and decodes of random latents",
        "precision": "fp32",
        "device": "cpu",
    }
    sides = {ratio.side: "our C++" for ratio in ratios} | {x.against: "oneDNN" for x in ratios}
    return replace(
        envelope("cpu-conv", scope, identity),
        figures=tuple(figures),
        sides=sides,
        ratios=tuple(ratios),
        differences=tuple(differences),
    )


def _add_convolution(
    sizes: tuple[int, int, int, int, int],
    rounds: int,
    figures: list[Figure],
    ratios: list[Ratio],
    differences: list[OutputDifference],
) -> None:
    c_in, c_out, frames, rows, columns = sizes
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(1, c_in, frames + 2, rows, columns, generator=generator))
    weight = torch.randn(c_out, c_in, 3, 3, 3, generator=generator) / (27 * c_in) ** 0.5
    weight, bias = channels_last(weight), torch.randn(c_out, generator=generator)
    exact = F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    name = f"conv {c_in}-{c_out} {frames}x{rows}x{columns}"
    ours, other = f"{name} {WINOGRAD}", f"{name} {ONEDNN}"
    samples: dict[str, list[tuple[float, float]]] = {other: [], ours: []}
    outputs: dict[str, Tensor] = {}
    for index in range(rounds + 1):
        for side, chosen in ((other, {}), (ours, _AS_CPU)):
            with torch.inference_mode(), using("reference", **chosen):
                start, cpu = time.perf_counter(), time.process_time()
                outputs[side] = causal_conv3d(x, weight, bias)
                sample = time.perf_counter() - start, time.process_time() - cpu
            if index:  # the first call finds cold caches
                samples[side].append(sample)
    medians = {}
    for side, pairs in samples.items():
        for index, measure in enumerate(("time", "CPU time")):
            values = tuple(pair[index] for pair in pairs)
            figure = Figure(name=f"{side}/{measure}", unit="s", samples=values)
            figures.append(figure)
            medians[side, measure] = figure.median
        difference = outputs[side] - exact
        differences.append(
            OutputDifference(
                side=side,
                against="fp64",
                max_abs=difference.abs().max().item(),
                unit="for inputs of deviation 1",
                relative_l2=(difference.norm() / exact.norm()).item(),
            )
        )
    quotients = {m: medians[other, m] / medians[ours, m] for m in ("time", "CPU time")}
    ratio = Ratio(side=ours, against=other, time=quotients["time"], cpu_time=quotients["CPU time"])
    ratios.append(ratio)


def prepare(contender: str, work: DecodeWork) -> tuple[Run, Iterable[Tensor]]:
    """Return the decode of a contender, warm, and the weights and the latent that it uses."""
    net = _decoder(work.decoder)
    chosen: Mapping[str, Implementation] = {}
    if contender == WINOGRAD:
        reason = open_cpu_kernels(lambda line: None)
        assert reason is None, reason
        chosen = _AS_CPU
    tiling = TilingConfig(strips=work.strips)

    def run(latent: Tensor) -> Tensor:
        with using("reference", **chosen):
            return our_decode(net, latent, tiling)

    latent = work.latent
    run(latent[:, :2])
    return partial(run, latent), [latent, *net.state_dict().values()]


def _decoder(name: str) -> VaeDecoder:
    """Build a decoder of DECODES; random weights are as PyTorch initialises them."""
    torch.manual_seed(0)
    net = VaeDecoder(_CONFIGS[name]).requires_grad_(False)
    weights: dict[str, Any] = dict(net.state_dict())
    if name == _TRAINED:
        trained = read_weights(TRAINED).vae
        weights = {key: trained[key] for key in weights}
    net.load_state_dict({key: channels_last(x) for key, x in weights.items()}, assign=True)
    return net


if __name__ == "__main__":
    serve(DecodeWork, prepare)
