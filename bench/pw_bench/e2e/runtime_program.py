# SPDX-License-Identifier: Apache-2.0
"""This runtime as a program of the end-to-end benchmark: one `pw generate` per clip."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pw_bench.e2e.job import ClipFacts, Job
from pw_bench.e2e.synthetic import IN_MEMORY, synthetic_bundle
from pw_kernels.op import OPS, select
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.job.conv_choice import computing_as
from pw_runtime.pipeline import generate
from pw_runtime.planning.fast import recommended
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import span
from pw_runtime.types import EnginePolicy, Prompt, Request, RunOptions


class Silent(Reporter):
    """Prints no path of a finished clip: it is gone when the measurement ends."""

    def finished(self, path: Path) -> None:
        """Print nothing."""


class RuntimeProgram:
    """`pw generate` in this process; between clips, networks are kept only if the job says so."""

    def __init__(
        self, policy: EnginePolicy = "eager", *, fast: bool = False, **options: Any
    ) -> None:
        """Take the options of `pw generate` of these names."""
        self._fast = fast
        self._options = {"policy": policy, **options}
        self._folder = tempfile.TemporaryDirectory()
        self._bundle: Bundle | None = None
        self._warm = WarmNetworks()

    def clip(self, job: Job, video: Path) -> ClipFacts:
        """Generate the clip. Raises RuntimeError where it fails."""
        options = dict(self._options)
        if self._fast:
            options |= recommended(job.preset, torch.device(job.device))
        request = Request(
            prompts=(Prompt(id=video.stem, text=job.prompt, position=1),),
            preset=job.preset,
            out=video.parent,
            negative=job.negative,
            noise=job.noise,
            options=RunOptions(
                codec=job.codec,
                precision=job.precision,
                device=job.device,
                **options,
            ),
        )
        warm = self._warm if job.keep_networks else None
        (outcome,) = generate(request, self._open(job), Silent(quiet=True), warm=warm)
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        assert outcome.video == video
        receipt = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
        operations = operations_in(receipt, request.options)
        return replace(facts_of(receipt, operations), options=request.options)

    def _open(self, job: Job) -> Bundle:
        if job.in_memory is None and not (job.keep_networks and self._bundle):
            self._bundle = open_bundle(job.bundle)
        elif self._bundle is None and job.in_memory is not None:
            with span("make weights"):
                self._bundle = synthetic_bundle(Path(self._folder.name), IN_MEMORY[job.in_memory])
        assert self._bundle is not None
        return self._bundle


def operations_in(receipt: Mapping[str, Any], options: RunOptions) -> dict[str, str]:
    """Return operation -> implementation of a clip: what its run settled, by its receipt."""
    settled = {name: receipt["options"][name] for name in ("conv", "kernels", "attention")}
    with computing_as(replace(options, **settled)):
        return {name: select(name, options.torch_device) for name in sorted(OPS)}


def facts_of(receipt: Mapping[str, Any], operations: Mapping[str, str]) -> ClipFacts:
    """Read the facts in a clip's receipt. Notices that are not fallbacks do not count."""
    stages = (receipt.get("plan") or {}).get("stages", {})
    return ClipFacts(
        fallbacks=tuple(receipt.get("fallbacks", [])),
        engines={
            network: " ".join((engine["backend"], engine.get("digest", "")[:16])).strip()
            for network, engine in receipt.get("engines", {}).items()
        },
        operations=operations,
        peaks=receipt.get("peak_memory_bytes") or {},
        predicted={stage: dict(memory["predicted"]) for stage, memory in stages.items()},
        measured={
            stage: dict(memory["measured"])
            for stage, memory in stages.items()
            if memory.get("measured")
        },
    )
