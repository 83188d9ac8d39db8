# SPDX-License-Identifier: Apache-2.0
"""The nodes make the clip of the command line, bit for bit, through LATENTs in ComfyUI's format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from pw_runtime import Pipeline
from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.comfyui.latent import NORMALISED, SAMPLES, from_comfy, picture_of, to_comfy
from pw_runtime.comfyui.nodes import PRESET_NAMES, _make_room
from pw_runtime.errors import BadRequest
from pw_runtime.presets import PRESETS
from pw_runtime.types import VaeConfig
from tests.comfyui.loader import Comfy, InterruptProcessingException, call, load_custom_node
from tests.e2e.pw import write_preset

FILE = "from pw_runtime.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS\n"
ROOT = Path(__file__).parents[2]
MADE_OF: dict[str, Any] = {"prompt": "a red ball", "negative": "blur", "seed": 7}


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    return Comfy(monkeypatch)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, type]:
    file = tmp_path_factory.mktemp("custom_nodes") / "pixelwizard.py"
    file.write_text(FILE)
    return {name.removeprefix("PixelWizard"): n for name, n in load_custom_node(file).items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset") / "small.toml")


@pytest.fixture(scope="module")
def model(nodes: dict[str, type], bundle_dir: Path, small: Path) -> Pipeline:
    (pipe,) = call(
        nodes["Load"], model=str(bundle_dir), preset="2k", preset_file=str(small), device="cpu"
    )
    return pipe


@pytest.fixture(scope="module")
def vae(bundle_dir: Path) -> VaeConfig:
    bundle: Bundle = open_bundle(bundle_dir)
    return bundle.networks.vae.config


def test_a_draft_from_an_image_is_that_of_the_pipeline_from_the_same_picture(
    nodes: dict[str, type], model: Pipeline, comfy: Comfy
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).float()[None] / 255
    (draft,) = call(nodes["Draft"], model=model, **MADE_OF, image=image)
    (without,) = call(nodes["Draft"], model=model, **MADE_OF)
    assert not torch.equal(draft[SAMPLES], without[SAMPLES])
    (preview,) = call(nodes["Decode"], model=model, latent=draft)
    drafted = model("a red ball", negative_prompt="blur", seed=7, draft_only=True, image=pixels)
    np.testing.assert_array_equal((preview * 255).round().to(torch.uint8).numpy(), drafted.frames)
    with pytest.raises(BadRequest, match="not one picture"):
        call(nodes["Draft"], model=model, **MADE_OF, image=image.repeat(2, 1, 1, 1))


def test_an_empty_prompt_is_refused_and_white_space_around_one_is_nothing(
    nodes: dict[str, type], model: Pipeline
) -> None:
    """It is what the nodes have before a prompt is written."""
    (draft,) = call(nodes["Draft"], model=model, **MADE_OF)
    (same,) = call(nodes["Draft"], model=model, **{**MADE_OF, "prompt": " a red ball\n"})
    assert torch.equal(draft[SAMPLES], same[SAMPLES])
    empty = {**MADE_OF, "prompt": " "}
    with pytest.raises(BadRequest, match="a prompt is empty"):
        call(nodes["Draft"], model=model, **empty)
    with pytest.raises(BadRequest, match="a prompt is empty"):
        call(nodes["Finish"], model=model, draft=draft, **empty)


def test_an_image_on_a_gpu_is_fetched(nodes: dict[str, type]) -> None:
    class Elsewhere(torch.Tensor):
        def to(self, *given: Any, **options: Any) -> torch.Tensor:
            moved = super().to(*given, **options)
            return moved.as_subclass(torch.Tensor) if "cpu" in given else moved

        def numpy(self, *, force: bool = False) -> Any:
            raise TypeError("can't convert it")

    image = (torch.arange(12).view(1, 2, 2, 3) / 255).as_subclass(Elsewhere)
    np.testing.assert_array_equal(picture_of(image), np.arange(12).reshape(2, 2, 3))


def test_a_seed_stays_as_it_is_after_a_run(nodes: dict[str, type]) -> None:
    """A new one would make another draft than the one that was chosen."""
    for name in ("Draft", "Finish"):
        options = nodes[name].INPUT_TYPES()["required"]["seed"][1]  # type: ignore[attr-defined]
        assert options["control_after_generate"] == "fixed"


def test_a_changed_preset_or_bundle_is_opened_again(nodes: dict[str, type], tmp_path: Path) -> None:
    load: Any = nodes["Load"]
    preset, manifest = tmp_path / "mine.toml", tmp_path / "bundle.json"

    def state() -> str:
        return str(load.IS_CHANGED(str(tmp_path), preset="2k", preset_file=str(preset)))

    states = [state()]
    for file, text in ((preset, "one"), (preset, "two"), (manifest, "{}")):
        file.write_text(text)
        states.append(state())
    assert len(set(states)) == 4
    assert state() == states[-1]


def test_a_model_that_another_node_names_stays_open(nodes: dict[str, type]) -> None:
    """ComfyUI asks before it knows what that node gives."""
    load: Any = nodes["Load"]
    asked: list[dict[str, None]] = [{}, {"model": None}, {"model": None, "preset_file": None}]
    assert len({load.IS_CHANGED(preset="2k", **names) for names in asked}) == 1


def test_models_of_comfyui_leave_the_gpu_before_a_node_plans(comfy: Comfy) -> None:
    for device, calls in (("cpu", []), ("cuda", ["unload_all_models", "soft_empty_cache"])):
        comfy.memory_calls.clear()
        _make_room(cast(Pipeline, SimpleNamespace(device=torch.device(device))))
        assert comfy.memory_calls == calls


def test_draft_finish_decode_are_one_call_of_the_pipeline_bit_for_bit(
    nodes: dict[str, type], model: Pipeline, comfy: Comfy, vae: VaeConfig
) -> None:
    (draft,) = call(nodes["Draft"], model=model, **MADE_OF)
    assert draft[SAMPLES].shape == (1, 48, 2, 4, 6)
    (preview,) = call(nodes["Decode"], model=model, latent=draft)
    assert preview.shape == (5, 64, 96, 3)
    (finished,) = call(nodes["Finish"], model=model, draft=draft, **MADE_OF)
    assert finished[SAMPLES].shape == (1, 48, 2, 6, 12)
    (images,) = call(nodes["Decode"], model=model, latent=finished)
    whole = model("a red ball", negative_prompt="blur", seed=7).frames
    assert (images.shape, images.dtype) == ((5, 96, 192, 3), torch.float32)
    np.testing.assert_array_equal((images * 255).round().to(torch.uint8).numpy(), whole)
    drafted = model("a red ball", negative_prompt="blur", seed=7, draft_only=True).frames
    np.testing.assert_array_equal((preview * 255).round().to(torch.uint8).numpy(), drafted)
    for bar in comfy.bars:
        assert bar == sorted(bar)
        assert bar[-1] == 1000
    assert len(comfy.bars) == 4


def test_the_latent_is_that_of_comfyuis_format(vae: VaeConfig) -> None:
    """process_out of Wan22 in comfy/latent_formats.py: latent * std / 1.0 + mean."""
    x = torch.randn(48, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(vae.latent_mean).view(1, 48, 1, 1, 1)
    std = torch.tensor(vae.latent_std).view(1, 48, 1, 1, 1)
    latent = to_comfy(x, vae)
    torch.testing.assert_close(latent[SAMPLES], x[None] * std / 1.0 + mean, rtol=0, atol=0)
    torch.testing.assert_close(from_comfy(latent, vae), x, rtol=0, atol=0)
    del latent[NORMALISED]  # a node that makes a new dictionary
    ulp = torch.finfo(torch.float32).eps * (latent[SAMPLES].abs().amax() / std.min() + 1)
    torch.testing.assert_close(from_comfy(latent, vae), x, rtol=0, atol=2 * float(ulp))


def test_the_published_statistics_are_those_of_comfyui() -> None:
    """The first and the last of the 48 channels in comfy/latent_formats.py."""
    from pw_export.wan22_configs import NETWORKS

    config = NETWORKS.vae.config
    assert (config.z_dim, len(config.latent_mean), len(config.latent_std)) == (48, 48, 48)
    assert (config.latent_mean[0], config.latent_mean[-1]) == (-0.2289, -0.0667)
    assert (config.latent_std[0], config.latent_std[-1]) == (0.4765, 0.7744)


def test_samples_that_a_node_has_changed_are_taken_as_they_are(vae: VaeConfig) -> None:
    x = torch.randn(48, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    latent = to_comfy(x, vae)
    changed = {**latent, SAMPLES: latent[SAMPLES] + 1}
    mean, std = (torch.tensor(v).view(48, 1, 1, 1) for v in (vae.latent_mean, vae.latent_std))
    expected = (x * std + mean + 1 - mean) / std
    torch.testing.assert_close(from_comfy(changed, vae), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ({"samples": torch.zeros(2, 48, 2, 4, 6)}, "not one clip"),
        ({"samples": torch.zeros(1, 16, 2, 4, 6)}, "not one clip"),
        ({"samples": torch.zeros(1, 48, 4, 6)}, "not one clip"),
        ({"samples": torch.zeros(1, 48, 2, 4, 6), "noise_mask": torch.ones(1)}, "masks"),
        ({"samples": torch.zeros(1, 48, 3, 4, 6)}, "not of this preset"),
        ({"samples": torch.zeros(1, 48, 2, 6, 12)}, "not of this preset"),
    ],
)
def test_a_latent_that_cannot_be_a_draft_is_one_error(
    nodes: dict[str, type], model: Pipeline, latent: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        call(nodes["Finish"], model=model, draft=latent, **MADE_OF)


def test_an_interruption_ends_the_node_with_comfyuis_exception_and_leaves_nothing(
    nodes: dict[str, type],
    model: Pipeline,
    comfy: Comfy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    comfy.interrupt_at = 300
    with pytest.raises(InterruptProcessingException):
        call(nodes["Draft"], model=model, **MADE_OF)
    assert 300 <= comfy.bars[-1][-1] < 1000
    assert list(tmp_path.iterdir()) == []


def test_a_preset_without_a_high_res_stage_has_nothing_to_finish(
    nodes: dict[str, type], model: Pipeline, bundle_dir: Path
) -> None:
    (drafts,) = call(nodes["Load"], model=str(bundle_dir), preset="draft", device="cpu")
    with pytest.raises(BadRequest, match="no high-res stage"):
        call(
            nodes["Finish"], model=drafts, draft={"samples": torch.zeros(1, 48, 1, 4, 6)}, **MADE_OF
        )


def test_what_the_load_node_leaves_empty_is_as_by_default(
    nodes: dict[str, type], bundle_dir: Path, small: Path
) -> None:
    (pipe,) = call(
        nodes["Load"], model=f" {bundle_dir} ", preset="2k", preset_file=str(small),
        changes="draft.steps=3\n\n highres.guidance=1 ",
    )  # fmt: skip
    assert (pipe.preset.draft.steps, pipe.preset.highres.guidance) == (3, 1.0)
    with pytest.raises(BadRequest, match="no model is named"):
        call(nodes["Load"], model="", preset="2k")


def test_the_presets_of_the_node_are_those_that_are_built_in() -> None:
    assert set(PRESET_NAMES) == set(PRESETS)


def test_loading_the_nodes_imports_no_torch() -> None:
    code = "import sys; import pw_runtime.comfyui; print({'torch', 'pydantic'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
