# SPDX-License-Identifier: Apache-2.0
"""This runtime as a program of the end-to-end benchmark: one `pw generate` per clip."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pw_bench.e2e.job import Job
from pw_bench.e2e.synthetic import synthetic_bundle
from pw_kernels.op import OPS, chosen, using
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.pipeline import generate
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import span
from pw_runtime.types import AttentionKernel, EnginePolicy, Kernels, Prompt, Request, RunOptions


class Ours:
    """`pw generate` in this process. Every clip loads its networks, as every run of `pw` does.

    Attributes:
        receipt: of the last clip.
        fell_back: what its receipt tells of that went otherwise than planned.
        operations: operation -> implementation, outside engines.
    """

    def __init__(
        self,
        policy: EnginePolicy = "eager",
        kernels: Kernels = "reference",
        attention: AttentionKernel | None = None,
    ) -> None:
        """With engines or without."""
        self._policy, self._kernels, self._attention = policy, kernels, attention
        self._folder = tempfile.TemporaryDirectory()
        self._in_memory: Bundle | None = None
        self.receipt: dict[str, Any] = {}
        self.fell_back: tuple[str, ...] = ()
        self.operations: dict[str, str] = {}

    def clip(self, job: Job, video: Path) -> None:
        """Generate the one clip."""
        request = Request(
            prompts=(Prompt(id=video.stem, text=job.prompt, position=1),),
            preset=job.preset,
            out=video.parent,
            negative=job.negative,
            noise=job.noise,
            options=RunOptions(
                codec=job.codec,
                precision=job.precision,
                policy=self._policy,
                kernels=self._kernels,
                attention=self._attention,
                device=job.device,
            ),
        )
        (outcome,) = generate(request, self._open(job), Reporter(quiet=True))
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        assert outcome.video == video
        self.receipt = json.loads(video.with_suffix(".json").read_text())
        self.fell_back = tuple(self.receipt["fallbacks"])
        options = request.options
        with using(options.kernels, attention=options.attention_kernel):
            self.operations = {name: chosen(name, request.device).implementation for name in OPS}

    def _open(self, job: Job) -> Bundle:
        if not job.in_memory:
            return open_bundle(job.bundle)
        if self._in_memory is None:
            with span("make weights"):
                self._in_memory = synthetic_bundle(Path(self._folder.name))
        return self._in_memory
