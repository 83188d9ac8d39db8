# SPDX-License-Identifier: Apache-2.0
"""The transformers against tensors of the official implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pw_kernels import attention, rope
from pw_kernels.qk_norm_rope import angles_of_tokens
from pw_runtime.models import WanDiT, expected_shapes
from pw_runtime.models.blocks import TextKeysValues, pad_biases
from pw_runtime.models.embeddings import rope_tables, sinusoid
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.types import DitConfig, Precision
from tests.closeness import max_abs, relative_l2
from tests.networks import TINY_DRAFT, TINY_HIGHRES
from tests.oracle import golden
from tests.tolerance import assert_as_accurate, ulp

FP32_TOLERANCE = 2e-5  # 42 ulp at the largest value of any block; the networks err by 16


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return golden.load("dit_tiny_inputs")


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return golden.load("dit_tiny_outputs")


@pytest.fixture(scope="module")
def load() -> Callable[[DitConfig, Precision], WanDiT]:
    weights = golden.load("dit_tiny_weights")

    def build(config: DitConfig, precision: Precision) -> WanDiT:
        with torch.device("meta"):
            net = WanDiT(config)
        names = expected_shapes("draft", config)
        stored = {name: store_dit_weight(name, weights[name], precision) for name in names}
        net.load_state_dict(stored, assign=True)
        return net.requires_grad_(False)

    return build


def context(inputs: dict[str, Tensor], which: str, precision: Precision) -> Tensor:
    x = inputs[f"ctx_{which}"]
    return x if precision == "fp32" else x.bfloat16()


def draft(net: WanDiT, x: Tensor, text: tuple[TextKeysValues, ...], t: Tensor) -> Tensor:
    return net(x, text, net.modulation(t), net.positions(x))


def highres(net: WanDiT, inputs: dict[str, Tensor], text: Tensor, **changed: Tensor) -> Tensor:
    values = inputs | changed
    t, dt = values["t_uniform"], values["dt_uniform"]
    control = net.control(net.draft_features(values["lr_latents"][0]), *sinusoids(t, dt))
    x, keys_values = values["x"], net.text_keys_values(text)
    return net(x, keys_values, net.modulation(t, dt), net.positions(x), control)


def sinusoids(t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return sinusoid(t, TINY_HIGHRES.freq_dim), sinusoid(dt, TINY_HIGHRES.freq_dim)


def control_of(net: WanDiT, inputs: dict[str, Tensor]) -> Tensor:
    """[S, D] of the one controlled block."""
    features = net.draft_features(inputs["lr_latents"][0])
    steps = sinusoids(inputs["t_uniform"], inputs["dt_uniform"])
    (control,) = net.control(features, *steps)
    return control


@pytest.mark.parametrize("which", ["a", "b"])
def test_draft_network_equals_official_in_fp32(load, inputs, outputs, which) -> None:
    net = load(TINY_DRAFT, "fp32")
    text = net.text_keys_values(inputs[f"ctx_{which}"])
    v = draft(net, inputs["x"], text, inputs["t_uniform"])
    assert max_abs(v, outputs[f"t2v_fp32_{which}"]) <= FP32_TOLERANCE


def test_padding_the_sequence_changes_nothing_we_return(load, inputs, outputs) -> None:
    """The official 80-token run of a 72-token clip equals our unpadded one."""
    net = load(TINY_DRAFT, "fp32")
    text = net.text_keys_values(inputs["ctx_a"])
    v = draft(net, inputs["x"], text, inputs["t_uniform"])
    assert max_abs(v, outputs["t2v_pad80_fp32_a"]) <= FP32_TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_timestep_per_latent_frame_equals_official(load, inputs, outputs, precision) -> None:
    net = load(TINY_DRAFT, precision)
    t = inputs["t_uniform"].repeat(inputs["x"].shape[1])
    t[0] = 0
    text = net.text_keys_values(context(inputs, "a", precision))
    v = draft(net, inputs["x"], text, t)
    official, exact = outputs["ti2v_firstframe0_bf16emu_a"], outputs["ti2v_firstframe0_fp32_a"]
    if precision == "fp32":
        assert max_abs(v, exact) <= FP32_TOLERANCE
    else:
        assert_as_accurate(v, official, exact)


@pytest.mark.parametrize("which", ["a", "b"])
def test_highres_network_equals_official_in_fp32(load, inputs, outputs, which) -> None:
    v = highres(load(TINY_HIGHRES, "fp32"), inputs, inputs[f"ctx_{which}"])
    assert max_abs(v, outputs[f"hr_fp32_{which}"]) <= FP32_TOLERANCE


def test_adapter_control_equals_official(load, inputs, outputs) -> None:
    official, exact = outputs["hr_control_bf16emu"][0], outputs["hr_control_fp32"][0]
    fp32, bf16 = (
        control_of(load(TINY_HIGHRES, precision), inputs) for precision in ("fp32", "bf16")
    )
    assert max_abs(fp32, exact) <= FP32_TOLERANCE
    assert_as_accurate(bf16, official, exact)


def test_the_bound_on_bf16_passes_another_rounding_and_no_missing_term(
    load, inputs, outputs
) -> None:
    """oneDNN's AVX-512 code rounds some products of the adapter to the neighbouring bf16."""
    official, exact = outputs["hr_control_bf16emu"][0], outputs["hr_control_fp32"][0]
    net = load(TINY_HIGHRES, "bf16")
    control = control_of(net, inputs)
    for index in (control.abs().argmax(), control.abs().argmin()):
        rounded = control.clone().flatten()
        rounded[index] += ulp(rounded[index], torch.bfloat16)
        assert_as_accurate(rounded.view_as(control), official, exact)
    for part in ("adapter_time_proj.0.bias", "adapter_dt_proj.2.weight", "zero_layers.1.bias"):
        net = load(TINY_HIGHRES, "bf16")
        net.spatial_adapter.get_parameter(part).zero_()
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(control_of(net, inputs), official, exact)


def test_every_highres_block_equals_official(load, inputs, outputs) -> None:
    net = load(TINY_HIGHRES, "fp32")
    seen: list[Tensor] = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    highres(net, inputs, inputs["ctx_a"])
    for index, x in enumerate(seen):
        assert max_abs(x[None], outputs[f"hr_block{index}_fp32"]) <= FP32_TOLERANCE


def test_dropping_dt_or_the_draft_is_seen(load, inputs, outputs) -> None:
    """The sensitivity guard: a network that ignored either could not pass the tests above."""
    net = load(TINY_HIGHRES, "fp32")
    other_dt = highres(net, inputs, inputs["ctx_a"], dt_uniform=torch.tensor([56.0]))
    no_draft = highres(
        net, inputs, inputs["ctx_a"], lr_latents=torch.zeros_like(inputs["lr_latents"])
    )
    assert max_abs(other_dt, outputs["hr_fp32_a"]) > 1
    assert max_abs(no_draft, outputs["hr_fp32_a"]) > 1


@pytest.mark.parametrize("which", ["a", "b"])
def test_bf16_draft_network_is_as_close_as_official_bf16(load, inputs, outputs, which) -> None:
    net = load(TINY_DRAFT, "bf16")
    text = net.text_keys_values(context(inputs, which, "bf16"))
    v = draft(net, inputs["x"], text, inputs["t_uniform"])
    assert_as_accurate(v, outputs[f"t2v_bf16emu_{which}"], outputs[f"t2v_fp32_{which}"])


def test_bf16_highres_network_is_as_close_as_official_bf16(load, inputs, outputs) -> None:
    v = highres(load(TINY_HIGHRES, "bf16"), inputs, context(inputs, "a", "bf16"))
    assert_as_accurate(v, outputs["hr_bf16emu_a"], outputs["hr_fp32_a"])


def test_text_of_full_length_needs_no_pad_row(load, inputs) -> None:
    """Text that fills text_len has no pad key, so its bias is 0 and its rows are its own."""
    net = load(TINY_DRAFT, "fp32")
    full = torch.randn(
        TINY_DRAFT.text_len, TINY_DRAFT.text_dim, generator=torch.Generator().manual_seed(1)
    )
    entry = net.text_keys_values(full)[0]
    assert not entry.bias.any()
    assert entry.keys.shape[0] == TINY_DRAFT.text_len


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_pad", [1, 2, 3, 100, 212, 412, 511])
def test_pad_biases_weigh_as_much_as_the_rows_they_stand_for(dtype, num_pad) -> None:
    """ln(412) rounded to bf16 alone would weigh 0.6 % too much."""
    biases = torch.tensor(pad_biases(num_pad, dtype), dtype=dtype).double()
    assert abs(biases.exp().sum().item() / num_pad - 1) <= 1e-4
    assert len(biases) <= 3


def test_collapsed_padding_is_as_exact_in_bf16_as_attending_to_every_row() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(n, 4, 64, generator=generator) for n in (64, 101, 101))
    num_pad = 412

    def padded(x: Tensor) -> Tensor:
        return torch.cat((x[:-1], x[-1:].expand(num_pad, -1, -1)))

    def collapsed(x: Tensor, biases: tuple[float, ...]) -> Tensor:
        return torch.cat((x[:-1], x[-1:].expand(len(biases), -1, -1)))

    exact = attention(q.double(), padded(k).double(), padded(v).double())
    low = [x.bfloat16() for x in (q, k, v)]
    all_rows = attention(low[0], padded(low[1]), padded(low[2]))
    biases = pad_biases(num_pad, torch.bfloat16)
    bias = torch.tensor((0.0,) * 100 + biases, dtype=torch.bfloat16)
    few_rows = attention(low[0], collapsed(low[1], biases), collapsed(low[2], biases), bias)
    assert relative_l2(few_rows, exact) <= 1.2 * relative_l2(all_rows, exact)


def test_networks_refuse_missing_or_surplus_conditions(load, inputs) -> None:
    low, high = load(TINY_DRAFT, "fp32"), load(TINY_HIGHRES, "fp32")
    with pytest.raises(ValueError, match="dt"):
        low.modulation(inputs["t_uniform"], inputs["dt_uniform"])
    with pytest.raises(ValueError, match="dt"):
        high.modulation(inputs["t_uniform"])
    x, text = inputs["x"], high.text_keys_values(inputs["ctx_a"])
    modulation = high.modulation(inputs["t_uniform"], inputs["dt_uniform"])
    with pytest.raises(ValueError, match="needs a control"):
        high(x, text, modulation, high.positions(x))


def test_positions_of_another_grid_are_refused(load, inputs) -> None:
    net, x = load(TINY_DRAFT, "fp32"), inputs["x"]
    text, modulation = net.text_keys_values(inputs["ctx_a"]), net.modulation(inputs["t_uniform"])
    with pytest.raises(ValueError, match=r"token grid \(2, .* positions \(1, "):
        net(x[:, :2], text, modulation, net.positions(x[:, :1]))


def test_sinusoid_and_rope_equal_official() -> None:
    misc = golden.load("pipeline_misc")
    assert max_abs(sinusoid(misc["sin_t"], 256), misc["sin_emb"]) == 0
    cos, sin = rope_tables(5, 128, torch.device("cpu"))
    cos, sin = (angles_of_tokens(table, torch.tensor([0, 3, 5]), 30) for table in (cos, sin))
    rotated = rope(misc["rope_in"][0], cos, sin)
    exact = rope(misc["rope_in"][0].double(), cos.double(), sin.double())
    assert_as_accurate(rotated, misc["rope_out_grid2x3x5"][0], exact)


def test_rope_table_equals_official_at_far_positions() -> None:
    misc = golden.load("pipeline_misc")
    length = int(misc["rope_pos"].max()) + 1
    cos, sin = rope_tables(length, 128, torch.device("cpu"))
    one_rounding = torch.finfo(torch.float32).eps
    assert max_abs(cos[misc["rope_pos"]], misc["rope_cos"]) <= one_rounding
    assert max_abs(sin[misc["rope_pos"]], misc["rope_sin"]) <= one_rounding
