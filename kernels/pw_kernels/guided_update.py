# SPDX-License-Identifier: Apache-2.0
"""One step of a sampler after the network has run: guidance, data prediction, the new latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pw_kernels.launcher import cdiv, launch
from pw_kernels.op import Cost, Op, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("guided_update")
_BLOCK = 1024  # with 4 warps: two 16-byte loads per thread and tensor


class Update(NamedTuple):
    """Coefficients of one linear multistep update of the latent.

    x_new = keep x + data m + slope (new_weight (m_new - m) + old_weight (m_old - m) / r)

    Kept in this form, not multiplied out, because the official code rounds the `old` term to
    bf16 under autocast. Multiplied out, the second prediction of the 2K preset, for example, is
    x2 = .8973648 xc + .1123177 m1 - .0096825 m0.
    """

    keep: float
    data: float
    slope: float = 0.0
    new_weight: float = 0.0  # 0: no later prediction is used
    old_weight: float = 0.0  # 0: no earlier prediction is used
    inverse_r: float = 0.0


_UNCHANGED = Update(keep=1.0, data=0.0)


def guided_update(
    cond: Tensor,
    uncond: Tensor,
    x: Tensor,
    base: Tensor,
    before: Tensor | None,
    earlier: Tensor | None,
    guidance: float,
    sigma: float,
    corrector: Update | None,
    predictor: Update,
    *,
    bf16_einsum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply guidance, predict the data, correct the latent and take the next step.

    v = uncond + guidance (cond - uncond); m = x - sigma v; the corrector leads from `base` to the
    corrected latent with (m_old, m, m_new) = (earlier, before, m), and the predictor from there
    to the next latent with (m_old, m) = (before, m).

    Args:
        cond: velocity with the prompt. All tensors are fp32 of one shape.
        uncond: velocity with the negative prompt.
        x: latent that the network saw.
        base: corrected latent of the previous step; read only by a corrector.
        before: data prediction of the previous step; None at the first step.
        earlier: data prediction of two steps ago; None at the first two steps.
        guidance: scale of classifier-free guidance.
        sigma: noise level of x.
        corrector: None: the corrected latent is x.
        predictor: its new_weight is 0.
        bf16_einsum: round the old terms to bf16, as the official loop does under autocast;
            reference only.

    Returns:
        The next latent, the corrected latent and the data prediction m.

    Raises:
        ValueError: bf16_einsum with the kernel, or input that the kernel does not take.
    """
    arguments = (cond, uncond, x, base, before, earlier, guidance, sigma, corrector, predictor)
    if select("guided_update", x.device) == "triton":
        expected = "no bf16_einsum, which only the reference has: --kernels reference"
        require(not bf16_einsum, "guided_update", expected, bf16_einsum)
        return torch.ops.pw.guided_update(*arguments)
    return reference(*arguments, bf16_einsum)


def reference(
    cond: Tensor,
    uncond: Tensor,
    x: Tensor,
    base: Tensor,
    before: Tensor | None,
    earlier: Tensor | None,
    guidance: float,
    sigma: float,
    corrector: Sequence[float] | None,
    predictor: Sequence[float],
    bf16_einsum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle of `guided_update`; an `Update` reaches it as a list of floats from the operator."""
    m = x - sigma * (uncond + guidance * (cond - uncond))
    if corrector is None:
        corrected = x.clone()  # an operator must not return its argument
    else:
        assert before is not None, "a corrector needs the previous prediction"
        corrected = _apply(Update(*corrector), base, before, m, earlier, bf16_einsum)
    next_latent = _apply(Update(*predictor), corrected, m, None, before, bf16_einsum)
    return next_latent, corrected, m


def _apply(
    update: Update,
    x: Tensor,
    m: Tensor,
    new: Tensor | None,
    old: Tensor | None,
    bf16_einsum: bool,
) -> Tensor:
    result = update.keep * x + update.data * m
    correction = None
    if old is not None and update.old_weight:
        difference = (old - m) * update.inverse_r
        if bf16_einsum:
            weight = torch.tensor(update.old_weight, dtype=torch.bfloat16)
            correction = weight * difference.bfloat16()
        else:
            correction = update.old_weight * difference
    if new is not None and update.new_weight:
        new_term = update.new_weight * (new - m)
        correction = new_term if correction is None else correction + new_term
    if correction is None:
        return result
    # A zero-dimensional tensor, as in the official code: it does not widen a bf16 correction
    # (the predictor's), whose product then stays bf16 too.
    return result + torch.tensor(update.slope, dtype=torch.float32) * correction


def cost(
    cond: Tensor,
    uncond: Tensor,
    x: Tensor,
    base: Tensor,
    before: Tensor | None,
    earlier: Tensor | None,
    guidance: float,
    sigma: float,
    corrector: Update | None,
    predictor: Update,
) -> Cost:
    """Count one read of every tensor that is used, one write of the three results."""
    used = [cond, uncond, x]
    used += [base] if corrector else []
    used += [m for m in (before, earlier) if m is not None]
    moved = (len(used) + 3) * x.numel() * x.element_size()
    return Cost(flops=(24 if corrector else 14) * x.numel(), bytes=moved)


def _check(
    cond: Tensor,
    uncond: Tensor,
    x: Tensor,
    base: Tensor,
    before: Tensor | None,
    earlier: Tensor | None,
    corrector: Update | None,
    predictor: Update,
) -> None:
    name = "guided_update"
    for tensor in (x, cond, uncond, base, before, earlier):
        if tensor is None:
            continue
        require(tensor.dtype == torch.float32, name, "fp32", tensor.dtype)
        require(tensor.is_contiguous(), name, "contiguous tensors", tensor.stride())
        expected = f"all tensors of x's shape {tuple(x.shape)}"
        require(tensor.shape == x.shape, name, expected, tuple(tensor.shape))
        require(tensor.device == x.device, name, f"all tensors on {x.device}", tensor.device)
    require(x.numel() > 0, name, "at least one element", tuple(x.shape))
    require(predictor.new_weight == 0, name, "a predictor without new_weight", predictor)
    for role, update, needed, old in (
        ("corrector", corrector, before, earlier),
        ("predictor", predictor, x, before),
    ):
        if update is not None:
            complete = needed is not None and (old is not None or update.old_weight == 0)
            require(complete, name, f"every prediction that the {role} uses", update)


_op = torch.library.custom_op(
    "pw::guided_update",
    reference,
    mutates_args=(),
    schema=(  # bf16_einsum is the reference's alone
        "(Tensor cond, Tensor uncond, Tensor x, Tensor base, Tensor? before, Tensor? earlier, "
        "float guidance, float sigma, float[]? corrector, float[] predictor) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
_op.register_fake(reference)


@_op.register_kernel("cuda")
def run_kernel(
    cond: Tensor,
    uncond: Tensor,
    x: Tensor,
    base: Tensor,
    before: Tensor | None,
    earlier: Tensor | None,
    guidance: float,
    sigma: float,
    corrector: Sequence[float] | None,
    predictor: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    correct = None if corrector is None else Update(*corrector)
    predict = Update(*predictor)
    _check(cond, uncond, x, base, before, earlier, correct, predict)
    correct = _UNCHANGED if correct is None else correct
    next_latent, corrected, prediction = (torch.empty_like(x) for _ in range(3))
    launch(
        _KERNEL,
        (cdiv(x.numel(), _BLOCK),),
        {
            "cond_ptr": cond,
            "uncond_ptr": uncond,
            "x_ptr": x,
            "base_ptr": x if corrector is None else base,
            "before_ptr": x if before is None else before,
            "earlier_ptr": x if earlier is None else earlier,
            "next_ptr": next_latent,
            "corrected_ptr": corrected,
            "prediction_ptr": prediction,
            "numel": x.numel(),
            "guidance": float(guidance),
            "sigma": float(sigma),
            "correct_keep": correct.keep,
            "correct_data": correct.data,
            "correct_slope": correct.slope,
            "correct_new": correct.new_weight,
            "correct_old": correct.old_weight,
            "correct_inverse_r": correct.inverse_r,
            "keep": predict.keep,
            "data": predict.data,
            "slope": predict.slope,
            "old_weight": predict.old_weight,
            "inverse_r": predict.inverse_r,
        },
        {"BLOCK": _BLOCK},
        num_warps=4,
    )
    return next_latent, corrected, prediction


OP = register(Op("guided_update", reference, cost, run_kernel))
