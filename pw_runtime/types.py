# SPDX-License-Identifier: Apache-2.0
"""Nouns that cross a file border, frozen. Importing this file does not import torch.

Shape letters used in comments and docstrings everywhere:
  C latent channels (48) . T latent frames . H W latent rows, columns (16 px each)
  S video tokens = T * H/2 * W/2 . E text tokens . D transformer width . N heads . K head width
  F pixel frames = 4 (T - 1) + 1 . R modulation rows (1 per step, or T when t differs per frame)
  B batch, always 1 . token grid = (T, H/2, W/2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Solver = Literal["unipc", "dpm++"]
Tiling = Literal["exact", "official"]
StageName = Literal["draft", "highres"]
SourceKind = Literal["image", "draft_video"]
Network = Literal["draft", "highres", "vae", "text_encoder"]
Pass = Literal["cond", "uncond"]  # of a transformer, with the prompt or with its negative
Precision = Literal["fp32", "bf16"]
Codec = Literal["h264", "hevc", "av1", "ffv1", "png"]
DecodeOrder = Literal["auto", "frames", "tiles"]
PixelFormat = Literal["rgb24", "yuv420p"]  # as libavutil names them
Place = Literal["device", "host"]
Kernels = Literal["auto", "reference", "triton"]
QuantizedFormat = Literal["int8", "int8-weight", "fp8", "nvfp4"]
LinearFormat = Literal["exact", "int8", "int8-weight", "fp8", "nvfp4"]
Conv = Literal["auto", "onednn", "winograd"]
EnginePolicy = Literal["auto", "engines", "eager"]
# Division of a transformer block among engines: parts around our attention, attention as an engine
# of its own between them, or one engine for all of it.
Blocks = Literal["segments", "attention", "whole"]
AttentionKernel = Literal[
    "auto", "reference", "triton", "gluon", "cudnn", "flash", "flash-attn", "flash-attn-4"
]

Residency = Literal["resident", "gathered", "streamed", "mapped"]
# "staging" are weights on their way to where the stage computes, "scratch" is memory of engines.
MemoryKind = Literal["weights", "staging", "caches", "activations", "scratch", "process"]
NoticeKind = Literal["fallback", "text", "noise", "disk", "approximation", "draft", "source"]

VAE_STRIDE = (4, 16, 16)  # frames, rows, columns of pixels in one latent cell
CHUNK = 8192  # most tokens in one call of an engine
CHUNKS = (16, 2**24)  # what a run may choose instead
TRAIN_STEPS = 1000  # timesteps that the networks were trained on
PATCH = 2  # latent rows and columns in one token

FORBID_UNKNOWN = {"extra": "forbid"}  # for pydantic: an unknown key is an error


# ---- what to make --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One denoising stage: picture size in pixels and its sampler settings."""

    __pydantic_config__ = FORBID_UNKNOWN

    width: int
    height: int
    steps: int
    shift: float
    guidance: float
    solver: Solver = "unipc"

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes that a step needs: v = uncond + guidance (cond - uncond)."""
        if self.guidance == 1:
            return ("cond",)
        return ("uncond",) if self.guidance == 0 else ("cond", "uncond")

    def tokens(self, video: VideoConfig) -> int:
        """Return the video tokens (S) of a clip of this size."""
        frames = (video.frames - 1) // VAE_STRIDE[0] + 1
        rows, columns = (n // (VAE_STRIDE[1] * PATCH) for n in (self.height, self.width))
        return frames * rows * columns


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoConfig:
    """Length (pixel frames, 4n+1) and speed of a clip."""

    __pydantic_config__ = FORBID_UNKNOWN

    frames: int
    fps: int = 24

    @property
    def usual_codec(self) -> Codec:
        """The codec of a clip for which none is named."""
        return "png" if self.frames == 1 else "h264"


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingConfig:
    """Division of the VAE decode into tiles.

    `exact` equals the undivided decode to rounding for any number of `strips`: it decodes bands of
    rows, each of which passes on what the next one needs (on engines, strips of columns with a
    halo). `official` blends strips of columns that were decoded independently, as the research code
    does; the seams show. `overlap` is what a strip of columns sees of its neighbours on each inner
    side, in latent columns; `exact` always takes at least the reach of the decoder (6).

    `order` says what is computed first, with the same results. `frames` finishes frame after frame,
    with the past of all tiles in memory, most of the decode's. `tiles` finishes tile after tile for
    the whole clip, with the past of one: finished pixels wait on the disk, and what the next tile
    needs on the host. `auto` is `frames` where it fits.
    """

    __pydantic_config__ = FORBID_UNKNOWN

    tiling: Tiling = "exact"
    strips: int = 1
    overlap: int = 3
    order: DecodeOrder = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compat:
    """Quirks of the official code, off by default (docs/numerics.md)."""

    __pydantic_config__ = FORBID_UNKNOWN

    bf16_einsum: bool = False
    bf16_timesteps: bool = False
    truncating_uint8: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """All numbers of one kind of clip; the tables of a preset file are these fields."""

    __pydantic_config__ = FORBID_UNKNOWN

    draft: StageConfig
    highres: StageConfig | None = None  # None: the draft is the clip
    video: VideoConfig
    decode: TilingConfig = field(default_factory=TilingConfig)
    compat: Compat = field(default_factory=Compat)

    def stages(self, *, draft_only: bool = False) -> dict[StageName, StageConfig]:
        """Return the denoising stages in order; the last one's latent becomes the clip."""
        if draft_only or self.highres is None:
            return {"draft": self.draft}
        return {"draft": self.draft, "highres": self.highres}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file; `position` (1-based) fixes its seeds, `id` names its files.

    A clip may start from a picture, which is its first frame, or from a video in place of a draft.
    """

    text: str
    id: str = "0"
    position: int = 1
    image: Path | None = None
    draft_video: Path | None = None

    @property
    def sources(self) -> dict[SourceKind, Path]:
        """The files that the clip starts from."""
        found = {"image": self.image, "draft_video": self.draft_video}
        return {kind: path for kind, path in found.items() if path is not None}  # type: ignore[misc]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file that a clip was started from: its name without a folder, its SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSource(Source):
    """A LoRA that a network was run with."""

    scale: float


# ---- what flows between the stages ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TextContext:
    """Text-encoder output for a prompt and its negative, cut to real length.

    None where no stage of the clip has a pass with that text.
    """

    cond: torch.Tensor | None  # [E, text_dim]
    uncond: torch.Tensor | None  # [E', text_dim]

    def of(self, name: Pass) -> torch.Tensor:
        """Return the text of a pass. Raises ValueError where it was not encoded."""
        context = self.cond if name == "cond" else self.uncond
        if context is None:
            raise ValueError(f"the text of the {name} pass was not encoded")
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """A clip in the VAE's normalised latent space."""

    x: torch.Tensor  # [C, T, H, W] fp32

    def on_host(self) -> Latent:
        """Return the latent in host memory, where it waits for the next stage."""
        return Latent(x=self.x.cpu())


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """The draft latent resized to the high-res token grid."""

    x: torch.Tensor  # [C, T, H/2, W/2] fp32, H and W of the high-res latent


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameChunk:
    """Consecutive finished frames, 8 bit, on the CPU.

    rgb24 is [frames, height, width, 3]. yuv420p, BT.709 in limited range, is [frames, height * 3/2,
    width]: as many lines of Y, then U and V with two of their lines on one.
    """

    start: int  # index of the first frame in the clip
    pixel_format: PixelFormat
    frames: torch.Tensor  # uint8, contiguous


# ---- what a bundle holds ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DitConfig:
    """Widths of a Wan transformer; the last three describe the high-res additions."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int = 512
    in_dim: int = 48
    out_dim: int = 48
    freq_dim: int = 256
    eps: float = 1e-6
    has_dt: bool = False
    adapter_dim: int = 0  # hidden channels of the spatial adapter; 0: no adapter
    control_blocks: tuple[int, ...] = ()  # blocks whose input receives the control

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.dim % (2 * self.num_heads):
            raise ValueError(f"{self.num_heads} heads do not divide width {self.dim} evenly")
        if self.text_len < 1 or self.eps <= 0 or self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError("text_len, eps and freq_dim must be positive, freq_dim even")
        if any(not 0 <= block < self.num_layers for block in self.control_blocks):
            raise ValueError(f"no blocks {self.control_blocks} among {self.num_layers}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head (K)."""
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Widths of a Wan2.2 VAE, stage by stage in the order they run."""

    z_dim: int
    encoder_dims: tuple[int, ...]  # channels entering stage 0, then leaving each stage
    decoder_dims: tuple[int, ...]
    encoder_blocks: int  # residual blocks per stage
    decoder_blocks: int
    temporal_downsample: tuple[bool, ...]  # encoder order; the decoder runs it reversed
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """Widths of a UMT5 encoder."""

    vocab_size: int
    dim: int
    attention_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


Config = DitConfig | VaeConfig | TextEncoderConfig


# ---- one run ----------------------------------------------------------------------------------


# What the official code uses for an empty negative prompt (wan/configs/shared_config.py).
OFFICIAL_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA that a user names for a network."""

    path: Path  # or a text, which becomes one
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Make a path of a text."""
        object.__setattr__(self, "path", Path(self.path))

    def __str__(self) -> str:
        """Return it as --lora takes it."""
        return f"{self.path}:{self.scale!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options for computing and encoding; receipts and latents files store them by name."""

    __pydantic_config__ = FORBID_UNKNOWN

    codec: Codec = "h264"
    precision: Precision | None = None  # of matrix products; None: fp32 on a CPU, bf16 on a GPU
    vae_precision: Precision = "fp32"
    device: str = "auto"  # auto: the first CUDA device, or else the CPU
    kernels: Kernels = "auto"  # of the operations in pw_kernels; auto: on a GPU ours, if they run
    # of attention alone; None: the same as `kernels`; auto: on a GPU the fastest, measured once
    attention: AttentionKernel | None = None
    linear: LinearFormat = "exact"  # large linear layers of the transformers; others approximate
    # Fraction of the blocks of keys that self-attention of the high-res stage keeps; None: exact.
    sparse_attention: float | None = None
    conv: Conv = "auto"  # of the decoder on a CPU; auto: winograd wherever it can run
    policy: EnginePolicy = "auto"  # which engines the transformers run on
    blocks: Blocks = "segments"  # of these engines; others need engines that fit the preset
    chunk: int = CHUNK
    draft_only: bool = False
    save_latents: bool = False
    # Relative change of the draft's velocity below which a step is extrapolated; None computes all.
    step_cache: float | None = None
    guidance_reuse: int = 0  # high-res steps after the first that run no negative pass
    image_highres: bool = False  # the picture is the first frame of the high-res stage, too
    # Noise level, 0 to 1, at which the draft begins with a video; at 0 the video is the draft.
    draft_strength: float = 0.0

    @property
    def attention_kernel(self) -> AttentionKernel:
        """The implementation of attention."""
        return self.attention or self.kernels

    @property
    def torch_device(self) -> torch.device:
        """The device to compute on."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def compute_precision(self) -> Precision:
        """The precision of matrix products."""
        return self.precision or ("fp32" if self.torch_device.type == "cpu" else "bf16")

    def resolved(self) -> RunOptions:
        """Return the options with a device and a precision that are named.

        On a CPU the kernels are named too; on a GPU `auto` is settled when the engines are known.
        """
        named = replace(self, device=str(self.torch_device), precision=self.compute_precision)
        if self.torch_device.type != "cpu":
            return replace(named, attention=self.attention_kernel)
        kernels = "reference" if self.kernels == "auto" else self.kernels
        attention = "reference" if self.attention_kernel == "auto" else self.attention_kernel
        return replace(named, kernels=kernels, attention=attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything a run is asked to do."""

    prompts: tuple[Prompt, ...]
    preset: Preset
    out: Path
    negative: str = OFFICIAL_NEGATIVE
    seed: int = 0  # base seed, not negative
    noise: Path | None = None  # safetensors file that replaces the drawn noise
    options: RunOptions = field(default_factory=RunOptions)
    drafts: Path | None = None  # folder with latents whose drafts are finished, not made
    overwrite: bool = False  # replace files of other clips in `out`, which are refused otherwise
    fresh: bool = False  # take over nothing that earlier runs made of the same clips
    spill: Path | None = None  # folder for latents that `out` refuses
    wait_for_disk: bool = False  # where the disk refuses them, instead of ending
    fragmented: bool = False  # also write an mp4 that can be played while it is encoded
    contact_sheet: bool = False
    divide_weights: bool = False  # among ranks, also where they would fit whole
    sequence: int | None = None  # ranks that share the tokens of a pass; None: as planned
    gpu_memory: int | None = None  # maximum bytes; None: what is free
    host_memory: int | None = None
    in_memory: bool = False  # frames are kept in memory to the end, and not encoded
    partial: bool = False  # some prompts of a list, which options may concern elsewhere
    fail_fast: bool = False  # a clip's error ends the run, and nothing is kept outside its folders

    def __post_init__(self) -> None:
        """Take paths that are given as text."""
        for name in ("out", "noise", "spill", "drafts"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, Path(path))

    @property
    def device(self) -> torch.device:
        """The device to compute on."""
        return self.options.torch_device

    @property
    def stages(self) -> dict[StageName, StageConfig]:
        """The denoising stages to run, in order; the last one's latent becomes the clip."""
        return self.preset.stages(draft_only=self.options.draft_only)

    def encoded(self, prompt: Prompt) -> tuple[StageName, ...]:
        """Return the stages for which the prompt's picture or video is encoded."""
        if prompt.image is not None and self.options.image_highres:
            return tuple(self.stages)
        if prompt.draft_video is not None and self.options.draft_strength == 1:
            return ()  # nothing of it would be left
        return ("draft",) if prompt.sources else ()

    @property
    def computed(self) -> dict[StageName, StageConfig]:
        """The stages whose network runs for at least one of the prompts."""
        names = {name for prompt in self.prompts for name in self.computed_for(prompt)}
        return {name: config for name, config in self.stages.items() if name in names}

    def computed_for(self, prompt: Prompt) -> dict[StageName, StageConfig]:
        """Return the stages whose network runs for a prompt."""
        return computed_stages(self.stages, prompt, self.options)

    @property
    def passes(self) -> frozenset[Pass]:
        """The passes of all stages that are computed."""
        return frozenset(name for stage in self.computed.values() for name in stage.passes)


def computed_stages(
    stages: Mapping[StageName, StageConfig], prompt: Prompt, options: RunOptions
) -> dict[StageName, StageConfig]:
    """Return the stages whose network runs for a prompt: not the draft's, where a video is it."""
    given = prompt.draft_video is not None and options.draft_strength == 0
    return {name: config for name, config in stages.items() if not (given and name == "draft")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a run told its user: kept in the receipts of the clips that it concerns."""

    kind: NoticeKind  # "fallback": computed in another way than planned or asked for
    text: str


# ---- what the planner decides -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Division of a stage among ranks: its passes, then the tokens and heads of each pass."""

    guidance: int = 1  # groups of ranks, each with a pass of every step
    sequence: int = 1  # ranks of a group

    @property
    def ranks(self) -> int:
        """Ranks that compute; further ones wait."""
        return self.guidance * self.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerPlan:
    """Execution of a transformer within a memory budget.

    Weights are on the device (`resident`), or come block by block from the other ranks
    (`gathered`: each keeps its share of every block), from host memory (`streamed`) or from the
    bundle's files (`mapped`). Neither this nor the split nor `share_attention` changes a bit of the
    result (a step of one pass has nothing to share); another `chunk` changes its rounding.
    """

    weights: Residency = "resident"
    share_attention: bool = True  # the first block's self-attention, among the passes of a step
    chunk: int = CHUNK  # most tokens in one call of an engine
    split: Split = field(default_factory=Split)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Execution of a decode within a memory budget."""

    tiling: TilingConfig
    engines: bool = False  # on engines that were built
    store_bytes: int = 0  # of a clip's finished tiles on the disk, in the order `tiles`
    ranks: int = 1  # that divide the tiles among them


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """Something that is in memory at the peak of a stage."""

    name: str
    kind: MemoryKind
    bytes: int
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Memory at the peak of one stage."""

    stage: str
    items: tuple[MemoryItem, ...]  # of the first rank, the largest first
    others: tuple[tuple[MemoryItem, ...], ...] = ()  # of each further rank

    def peak(self, place: Place) -> int:
        """Return the bytes that the first rank has in one place."""
        return self.of_ranks(place)[0]

    def of_ranks(self, place: Place) -> tuple[int, ...]:
        """Return the bytes that each rank has in one place."""
        return tuple(
            sum(item.bytes for item in items if item.place == place)
            for items in (self.items, *self.others)
        )

    def required(self, place: Place) -> int:
        """Return the bytes that a budget must have: the ranks share a host, but no device."""
        return (sum if place == "host" else max)(self.of_ranks(place))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that a run may take; no device means a run on the CPU."""

    host: int  # of all ranks
    device: int | None = None  # of each rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Execution of all stages within a budget, and what each takes at its peak."""

    budget: Budget
    text: Place | None  # None: another run has encoded the text
    encode: Place | None  # None: no clip starts from a picture or a video
    transformers: Mapping[StageName, TransformerPlan]
    decode: DecodePlan
    stages: tuple[StageMemory, ...]
    decisions: tuple[str, ...]  # each with its reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result for one prompt: a finished clip, or the reason why there is none."""

    prompt: Prompt
    video: Path | None
    error: str | None
