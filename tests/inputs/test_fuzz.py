# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind: one error of ours each, no traceback, nothing that hangs.

A damage may leave a file that is fine; then what is done with its content must not fail either.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from pw_bench.clips.compare import _changed_settings
from pw_bench.report import json_lines, markdown, write_html
from pw_bench.report.console import show, show_comparison
from pw_bench.report.regressions import compare_results
from pw_bench.results import read_result, write_result
from pw_engines.manifest import MANIFEST
from pw_engines.store import EngineStore, StoreError
from pw_runtime.checkpoint.bundle import check_tensors, open_bundle
from pw_runtime.errors import PixelWizardError
from pw_runtime.job.identity import of_receipt
from pw_runtime.job.latents import (
    DIGESTS,
    METADATA,
    check_latents,
    digests_of,
    read_latent,
    vae_digest,
    write_latents,
)
from pw_runtime.job.provenance import provenance_json
from pw_runtime.job.receipt import Receipt, read_receipt, versions, write_receipt
from pw_runtime.presets import find_preset
from pw_runtime.prompts import read_prompts
from pw_runtime.sampling.noise import load_noise
from pw_runtime.types import Network
from tests.bench.small_results import CLIP, KERNELS, RESULT, figure
from tests.e2e.pw import write_preset
from tests.engines.small import key, put
from tests.inputs.mutations import damaged_bytes, damaged_json, damaged_text
from tests.inputs.small_files import PRESET, small_latents, small_provenance

CASES = 320  # of each of the kinds, of which there are eight
SECONDS = 10  # for one case

Damage = Callable[[random.Random], bytes]
Kind = tuple[Path, Damage, Callable[[], object]]


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def either(content: bytes, structured: Callable[[random.Random], str]) -> Damage:
    """A third of the damages are to bytes, the others to values."""

    def damage(draw: random.Random) -> bytes:
        whole = draw.randrange(3) == 0
        return damaged_bytes(content, draw) if whole else as_bytes(structured(draw))

    return damage


def of_json(file: Path, read: Callable[[], object]) -> Kind:
    content = json.loads(file.read_bytes())
    return file, either(file.read_bytes(), lambda draw: damaged_json(content, draw)), read


def prompts(folder: Path, bundle: Path) -> Kind:
    file = folder / "p.jsonl"
    lines = [{"id": f"{i}", "text": f"a cat {i}"} for i in range(3)]
    text = "\n".join(map(json.dumps, lines))
    file.write_text(text)

    def damage(draw: random.Random) -> str:
        changed = [damaged_json(line, draw) for line in lines]
        return damaged_text(text, draw) if draw.randrange(2) else "\n".join(changed)

    return file, either(text.encode(), damage), lambda: read_prompts(file)


def preset(folder: Path, bundle: Path) -> Kind:
    file = write_preset(folder / "p.toml")
    text = file.read_text()
    return file, either(text.encode(), lambda draw: damaged_text(text, draw)), (
        lambda: find_preset(str(file))
    )  # fmt: skip


def manifest(folder: Path, bundle: Path) -> Kind:
    shutil.copytree(bundle, folder / "bundle", copy_function=lambda a, b: Path(b).symlink_to(a))
    file = folder / "bundle" / "bundle.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)

    def read() -> None:
        opened = open_bundle(folder / "bundle")
        for network in get_args(Network):
            check_tensors(opened, network)

    return of_json(file, read)


def latents(folder: Path, bundle: Path) -> Kind:
    """Half of the damages are to values that carry a digest, as a program would write them."""
    opened = open_bundle(bundle)
    provenance = small_provenance(vae_digest(opened))
    file = small_latents(folder / "0.latents.safetensors")
    tensors = {"draft_latent": read_latent(file, small_provenance(), "draft", CPU).x.clone()}
    write_latents(file, provenance, tensors)
    whole, origin = file.read_bytes(), json.loads(provenance_json(provenance))

    def damage(draw: random.Random) -> bytes:
        if draw.randrange(2):
            return damaged_bytes(whole, draw)
        text = damaged_json(origin, draw)
        metadata = {METADATA: text, DIGESTS: json.dumps(digests_of(text, tensors))}
        save_file(tensors, folder / "changed", metadata=metadata)
        return (folder / "changed").read_bytes()

    def read() -> None:
        found = check_latents(file, opened)
        torch.device(found.options.device.replace("auto", "cpu"))
        read_latent(file, found, "draft", CPU)

    return file, damage, read


def noise(folder: Path, bundle: Path) -> Kind:
    file = small_latents(folder / "noise.safetensors")
    whole = file.read_bytes()
    read = lambda: load_noise(file, PRESET.stages(), PRESET.video)  # noqa: E731
    return file, lambda draw: damaged_bytes(whole, draw), read


def receipt(folder: Path, bundle: Path) -> Kind:
    file, origin = folder / "0.json", json.loads(provenance_json(small_provenance()))
    shared = ("prompt", "negative", "seeds", "noise", "noise_file", "preset", "options", "bundle",
              "engines", "seconds", "machine")  # fmt: skip
    write_receipt(
        Receipt(
            **{name: origin[name] for name in shared}, video={"file": "0.mp4", "bytes": 5},
            notices=[], fallbacks=[], passes={}, versions=versions(), peak_memory_bytes=None,
            plan=None, kernel_launches=None, exactness={"label": "exact"},
            tiling=origin["decode"],
        ),
        file,
    )  # fmt: skip
    other = folder / "1.json"
    shutil.copy(file, other)

    def read() -> None:
        with contextlib.suppress(KeyError):  # `settle_existing` names the field that is missing
            of_receipt(read_receipt(file))
        _changed_settings(file.with_suffix(".mp4"), other.with_suffix(".mp4"))

    return of_json(file, read)


def result(folder: Path, bundle: Path) -> Kind:
    file = folder / "r.json"
    clips = (replace(CLIP, host=CLIP.host[:3], measured={"draft": {"host": 2**30}}),)
    memory = figure("ours/memory", 0.0, 2.0**30, unit="B")
    write_result(replace(RESULT, clips=clips, figures=(*RESULT.figures, memory)), file)

    def read() -> None:
        found = read_result(file)
        with contextlib.redirect_stdout(io.StringIO()):
            show(found)
            show_comparison(compare_results(found, found))
        write_html([found], folder / "page.html")
        markdown([found])
        json_lines([found])

    return of_json(file, read)


def kernels(folder: Path, bundle: Path) -> Kind:
    file, _, read = result(folder, bundle)
    write_result(KERNELS, file)
    return of_json(file, read)


def engine(folder: Path, bundle: Path) -> Kind:
    store = EngineStore(folder / "cache" / "engines")
    file = put(store) / MANIFEST
    return of_json(file, lambda: (store.find(key()), store.entries(verify=True)))


CPU = torch.device("cpu")
KINDS = [prompts, preset, manifest, latents, noise, receipt, result, kernels, engine]


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_error_or_fine(
    kind: Callable[[Path, Path], Kind], tmp_path: Path, bundle_dir: Path
) -> None:
    file, damage, read = kind(tmp_path, bundle_dir)
    read()  # as it was written
    refused, failures = 0, []
    for case in range(CASES):
        content = damage(random.Random(f"{kind.__name__} {case}"))
        file.write_bytes(content)
        try:
            with time_limit():
                read()
        except (PixelWizardError, StoreError) as error:
            refused += 1
            if not str(error).isprintable() and "\n  " not in str(error):
                failures.append((case, f"no line of text: {error!a}"))
        except Exception as error:
            failures.append((case, f"{type(error).__name__}: {error!s:.200}"))
    assert not failures, "\n".join(f"case {case}: {what}" for case, what in failures[:20])
    assert refused > CASES / 4 or kind is engine
