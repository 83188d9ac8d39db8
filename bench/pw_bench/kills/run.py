# SPDX-License-Identifier: Apache-2.0
"""Kill a batch at random moments, let it go on, and compare with a run that was never killed.

    pw bench kills --preset nano-hd --kills 100 --out FILE

A life is one process, from its start to its end. Each is killed (SIGKILL) at a moment drawn evenly
from the time that a whole run takes, unless it has ended before; then the same call goes on in the
same folder. When a batch is complete its files are compared, and another one begins.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter

from pw_bench.choices import SyntheticSize
from pw_bench.e2e.stages import limit_steps
from pw_bench.e2e.weights import PROMPT, Weights, pick_weights
from pw_bench.kills.program import KillTask
from pw_bench.measure.environment import envelope, identify
from pw_bench.result_sections import Kills, Ratio
from pw_bench.results import Figure, Result
from pw_engines.child import child_environment
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadResult
from pw_runtime.presets import find_preset

# In words that the built-in model knows.
PROMPTS: Final = (
    PROMPT,
    "a small blue cube falls over sand",
    "a green ball rises over snow",
)
LONGEST: Final = 1800.0  # seconds of a life, which then counts as hanging
# Of a receipt: what a run takes, and what its machine has free. The rest must be equal.
_MEASURED: Final = ("seconds", "peak_memory_bytes", "plan", "kernel_launches")


@dataclass(slots=True)
class _Life:
    """One process: how far it has come, by clip and stage, in steps or frames."""

    begun: dict[tuple[str, str], float] = field(default_factory=dict)
    reached: dict[tuple[str, str], float] = field(default_factory=dict)
    last: tuple[str, str] | None = None
    ended: dict[str, Any] | None = None  # what it took, where it was not killed
    seconds: float = 0.0

    def hear(self, line: str) -> None:
        """Take a line of the process."""
        told = json.loads(line)
        if isinstance(told, dict):
            self.ended = told
            return
        key, done = (told[0], told[1]), float(told[2])
        # A step at once was not computed, but taken over; of a decode, more than its first frame.
        before = self.reached.get(key, 0.0)
        at_once = done > 1 if key[1] == "decode" else done >= 1
        if before == self.begun.setdefault(key, 0.0) == 0.0 and at_once:
            self.begun[key] = done
        self.reached[key], self.last = done, key


def measure_kills(
    preset_name: str,
    *,
    model: Path | None,
    synthetic: SyntheticSize | None,
    steps: int | None,
    prompts: int,
    kills: int,
    pairs: int,
    seed: int,
    say: Callable[[str], None],
) -> Result:
    """Kill a batch so many times; count what is computed again, and what the journal costs.

    Args:
        preset_name: as for `pw generate`.
        model: bundle.
        synthetic: size of random weights instead.
        steps: of each denoising stage, at most.
        prompts: clips of a batch.
        kills: how many.
        pairs: runs with and without journal, in turns, whose CPU time is compared.
        seed: of the moments.
        say: receives progress.

    Raises BadRequest, BadWeights; BadResult where a run fails or hangs.
    """
    preset = find_preset(preset_name)
    preset = preset if steps is None else limit_steps(preset, steps)
    identity = identify(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = _weights(preset_name, model, synthetic, folder, say)
        task = KillTask(
            model=weights.bundle, preset=preset, prompts=PROMPTS[:prompts], out=folder / "whole"
        )
        costs = _costs(task, folder, pairs, say)
        whole = _finished(task)
        table = _killed(replace(task, out=folder / "killed"), whole, kills, seed, say)
    figures = tuple(
        Figure(name=name, unit="s", samples=tuple(samples)) for name, samples in costs.items()
    )
    scope = {
        "words": "a batch in new processes on a CPU, --policy eager, killed and run again",
        "preset": preset_name,
        "steps": "all" if steps is None else str(steps),
        "prompts": str(prompts),
        "seed": str(seed),
    }
    return replace(
        envelope("kills", scope, replace(identity, weights={weights.name: weights.digest})),
        figures=figures,
        ratios=(_ratio(costs),),
        kills=table,
    )


def _weights(
    preset: str,
    model: Path | None,
    synthetic: SyntheticSize | None,
    folder: Path,
    say: Callable[[str], None],
) -> Weights:
    if model is None:
        return pick_weights(preset, None, synthetic, folder, say)
    bundle = open_bundle(model)
    digest = f"sha256:{bundle.digest}"
    return Weights(name=model.name, checkpoint=model, bundle=model.resolve(), digest=digest)


def _costs(
    task: KillTask, folder: Path, pairs: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Measure whole runs with and without the journal, in turns; the first stays in its folder.

    Returns the samples by name of the figure.
    """
    costs: dict[str, list[float]] = {}
    for pair in range(pairs):
        for how in ("with", "without") if pair % 2 == 0 else ("without", "with"):
            out = task.out if (pair, how) == (0, "with") else folder / "cost"
            life = _live(replace(task, out=out, journal=how == "with"), LONGEST)
            if life.ended is None or life.ended["failed"]:
                raise BadResult("a run failed without a kill", got=life.ended)
            for name, seconds in (
                (f"{how} journal/CPU time", life.ended["cpu"]),
                (f"{how} journal/time", life.ended["wall"]),
                (f"process {how} journal/time", life.seconds),
            ):
                costs.setdefault(name, []).append(seconds)
            say(f"{how} journal: {life.ended['cpu']:.2f} s of CPU time, {life.ended['wall']:.2f} s")
            shutil.rmtree(folder / "cost", ignore_errors=True)
    return costs


def _ratio(costs: dict[str, list[float]]) -> Ratio:
    """Return how many times as fast a run with journal is as the one beside it without."""

    def times(measure: str) -> float:
        both = (costs[f"{how} journal/{measure}"] for how in ("with", "without"))
        pairs = zip(*both, strict=True)
        return statistics.median(without / with_ for with_, without in pairs)

    return Ratio(
        side="with journal",
        against="without journal",
        time=times("time"),
        cpu_time=times("CPU time"),
    )


def _killed(
    task: KillTask,
    whole: dict[str, str],
    kills: int,
    seed: int,
    say: Callable[[str], None],
) -> Kills:
    """Kill batches until enough processes have died; let the last one finish."""
    moments, lives, killed, batches = random.Random(seed), 0, 0, 0
    altered: list[str] = []
    again: dict[str, list[float]] = {}
    killed_in: dict[str, int] = {}
    span = _seconds(task, whole)
    while killed < kills:
        shutil.rmtree(task.out, ignore_errors=True)
        reached: dict[tuple[str, str], float] = {}
        life = _Life()
        while life.ended is None:
            limit = moments.uniform(0, span) if killed < kills else LONGEST
            life = _live(task, limit)
            lives += 1
            if life.ended is None:
                if limit == LONGEST:
                    raise BadResult("a run that goes on hangs", got=f"{LONGEST:.0f} s")
                killed += 1
                where = life.last[1] if life.last else "start"
                killed_in[where] = killed_in.get(where, 0) + 1
            elif life.ended["failed"]:
                raise BadResult("a run that goes on failed", got=life.ended["failed"])
            for key, begun in life.begun.items():
                if key in reached:
                    again.setdefault(key[1], []).append(max(0.0, reached[key] - begun))
                reached[key] = max(reached.get(key, 0.0), life.reached[key])
        batches += 1
        found = _finished(task)
        names = sorted({*found, *whole})
        altered += [name for name in names if found.get(name) != whole.get(name)]
        say(f"{killed} of {kills} kills, {batches} batches complete, {len(altered)} files differ")
    return Kills(
        kills=killed,
        processes=lives,
        batches=batches,
        files=batches * len(whole),
        altered=tuple(altered),
        killed_in=killed_in,
        again={stage: tuple(samples) for stage, samples in again.items()},
    )


def _seconds(task: KillTask, whole: dict[str, str]) -> float:
    """Return the seconds of a whole life, from which the moments are drawn."""
    shutil.rmtree(task.out, ignore_errors=True)
    life = _live(task, LONGEST)
    if life.ended is None or _finished(task) != whole:
        raise BadResult("two runs that were not killed differ", do="give it a machine of its own")
    return life.seconds


def _live(task: KillTask, limit: float) -> _Life:
    """Run a process, and kill it after so many seconds."""
    start, life = time.perf_counter(), _Life()
    with subprocess.Popen(
        [sys.executable, "-m", "pw_bench.kills.program"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None,
        env=child_environment(),
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as stdin:
            stdin.write(TypeAdapter(KillTask).dump_json(task).decode())
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if line.endswith("\n"):
                    life.hear(line)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if code not in (0, -9):
        raise BadResult("a run ended by itself before it was killed", got=f"exit code {code}")
    life.seconds = time.perf_counter() - start
    return life


def _finished(task: KillTask) -> dict[str, str]:
    """Return a digest of every file in the folder; of receipts, but for what was measured."""
    digests = {}
    for path in sorted(task.out.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".json":
            receipt = json.loads(content)
            kept = {name: value for name, value in receipt.items() if name not in _MEASURED}
            content = json.dumps(kept, sort_keys=True).encode()
        digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests
