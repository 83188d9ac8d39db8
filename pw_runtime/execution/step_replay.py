# SPDX-License-Identifier: Apache-2.0
"""Replay of a step on a GPU: recorded once as a CUDA graph, with the same bits.

A step of a draft is some thousand short kernels, which a GPU finishes faster than Python can start
them: on an H200, 0.24 s for arithmetic of 0.1 s. They are the same in every step of a clip, and
read only the latent and the modulation anew. What was recorded is compared with the step itself,
once a clip, before it takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from pw_runtime.execution.protocols import TokenLayout
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.dit import Modulation

MOST_TOKENS: Final = 16384  # of a pass; beyond, kernels are so long that nothing is gained

Compute = Callable[[Tensor, Modulation], list[Tensor]]


class StepReplay:
    """The step of one clip after the other, recorded when it is computed for the second time."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Record nothing yet.

        Args:
            say: told once where a step cannot be recorded, and is computed as without this.
        """
        self._say = say
        self._clip: tuple[object, object] | None = None  # whose step it is: texts and layout
        self._inputs: tuple[Tensor, Modulation] | None = None
        self._outputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False

    def velocities(
        self,
        compute: Compute,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
    ) -> list[Tensor]:
        """Return what `compute` gives for the latent and the modulation.

        Args:
            compute: a step with these texts and this layout, always the same operations.
            latent: [C, T, H, W] fp32.
            texts: the same objects in every step of a clip.
            modulation: of this step.
            layout: the same object in every step of a clip.
        """
        if layout.tokens > MOST_TOKENS or self._refused:
            return compute(latent, modulation)
        if self._clip is None or self._clip[0] is not texts or self._clip[1] is not layout:
            self.forget()
            self._clip = (texts, layout)
            return compute(latent, modulation)  # it compiles kernels, which no graph may
        if self._graph is None and not self._record(compute, latent, modulation):
            return compute(latent, modulation)
        assert self._graph is not None
        assert self._inputs is not None
        own_latent, own_modulation = self._inputs
        own_latent.copy_(latent)
        own_modulation.blocks.copy_(modulation.blocks)
        own_modulation.head.copy_(modulation.head)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def forget(self) -> None:
        """Free the recorded step and its memory."""
        self._clip = self._inputs = self._graph = None
        self._outputs = []

    def _record(self, compute: Compute, latent: Tensor, modulation: Modulation) -> bool:
        """Record a step and compare it once; return False where it cannot be replayed.

        That takes a step's memory twice, which no plan counts: out of memory is no error here.
        """
        graph = torch.cuda.CUDAGraph()
        inputs = (
            latent.clone(),
            Modulation(modulation.blocks.clone(), modulation.head.clone()),
        )
        try:
            # Only what this thread does is recorded: others may encode the last clip meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = compute(*inputs)
            graph.replay()
            same = all(map(torch.equal, outputs, compute(latent, modulation)))
        except RuntimeError as error:
            self._refuse(str(error).splitlines()[0])
            return False
        if not same:
            self._refuse("a recorded step gave other numbers than the step itself")
            return False
        self._graph, self._inputs, self._outputs = graph, inputs, outputs
        return True

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self.forget()
        self._say(f"steps are started kernel by kernel, not as a CUDA graph: {reason}")
