# SPDX-License-Identifier: Apache-2.0
"""`Pipeline`: prompts in, clips or frames out, with the networks loaded from call to call."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Unpack, overload

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.lora_choice import choose_loras
from pw_runtime.errors import BadRequest, BadResult, Cancelled
from pw_runtime.interface.arguments import (
    require_callable,
    require_kinds,
    require_options,
    require_texts,
)
from pw_runtime.interface.call import (
    Callback,
    CallOptions,
    CallReporter,
    PipelineOutput,
    Warnings,
    lora_files,
    opened_model,
    target_of,
    with_numbers,
    written,
)
from pw_runtime.interface.frames import HeldFrames, OutputType, as_output, check_output_type
from pw_runtime.interface.start_picture import picture_file
from pw_runtime.job.checks import pick_device
from pw_runtime.job.latents import SUFFIX, stages_of
from pw_runtime.job.run import Run
from pw_runtime.job.sources import started_from
from pw_runtime.pipeline import STAGES, generate
from pw_runtime.planning.oom_fallback import free_memory
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.presets import find_preset
from pw_runtime.sampling.noise import resolve_base_seed
from pw_runtime.stages.codecs import suffix
from pw_runtime.system.progress import Reporter
from pw_runtime.system.stop import Stopped, StopRequest
from pw_runtime.types import (
    OFFICIAL_NEGATIVE,
    Codec,
    LoraFile,
    Outcome,
    Preset,
    Prompt,
    Request,
    RunOptions,
)

if TYPE_CHECKING:
    import torch

    from pw_runtime.interface.start_picture import StartPicture

# why of the process: which implementation of an operation runs is a choice of the process, and a
# call makes it for as long as it runs (pw_kernels.op.using)
_CALLS: Final = threading.RLock()


class Pipeline:
    """A model and a preset; every call makes the clips of one or several prompts.

    Networks stay loaded between calls as far as memory allows, and as long as nothing they are
    made of changes. One call runs at a time, of all pipelines of a process: another thread waits.
    `close` releases the memory, as does the end of a `with` block.
    """

    def __init__(
        self,
        bundle: Bundle,
        preset: Preset,
        options: RunOptions,
        *,
        usual_codec: bool = False,
        reporter: Reporter | None = None,
        gpu_memory: int | None = None,
        host_memory: int | None = None,
    ) -> None:
        """Take an open bundle; `from_pretrained` opens one. Nothing is loaded before a call.

        With `usual_codec` the codec is that of the command line where none is named.
        """
        self._bundle, self._preset, self._options = bundle, preset, options
        self._usual_codec = usual_codec
        self._reporter = Warnings() if reporter is None else reporter
        self._gpu_memory, self._host_memory = gpu_memory, host_memory
        self._warm: WarmNetworks | None = WarmNetworks()
        self._stop: StopRequest | None = None  # of the call in progress

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        preset: str | Path | Preset = "2k",
        changes: Sequence[str] = (),
        draft: str | Path | None = None,
        highres: str | Path | None = None,
        loras: Sequence[str | Path | LoraFile] = (),
        loras_highres: Sequence[str | Path | LoraFile] | None = None,
        device: str = "auto",
        options: RunOptions | None = None,
        reporter: Reporter | None = None,
        gpu_memory: int | None = None,
        host_memory: int | None = None,
    ) -> Pipeline:
        """Open a model.

        Args:
            model: a bundle made by `pw convert`, or a published checkpoint, which is converted on
                first use into the cache, as by `pw generate --ckpt_dir`; a path, or ORG/NAME in
                the local cache of Hugging Face's hub. Nothing is downloaded.
            preset: its name, a .toml file, or the numbers themselves.
            changes: keys of a named preset with other values, "highres.steps=5" for instance, as
                --set takes them.
            draft: PixelWizard's draft checkpoint, for a published one.
            highres: PixelWizard's high-res checkpoint, for a published one.
            loras: merged into both transformers as they load: paths, texts as --lora takes them
                ("style.safetensors:0.8"), or `LoraFile`s.
            loras_highres: for the high-res transformer, in place of `loras`; empty: none.
            device: "auto" is the first CUDA device, or else the CPU.
            options: of every run; None: as of the command line, also the codec: "png" for one
                frame.
            reporter: shows progress; None says warnings alone: in the log where logging is
                configured, else on stderr.
            gpu_memory: maximum bytes; None: what is free.
            host_memory: maximum bytes; None: what is free.

        Raises:
            BadRequest, BadWeights: there is no such model, preset or device.
        """
        require_kinds(
            changes=changes,
            loras=loras,
            loras_highres=loras_highres,
            options=options,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
        )
        told = Warnings() if reporter is None else reporter
        usual_codec = options is None
        options = RunOptions() if options is None else options
        require_options(options)
        if device != "auto":
            options = replace(options, device=device)
        pick_device(options.device)
        if isinstance(preset, Preset) and changes:
            raise BadRequest(
                "changes are for a preset that is named",
                got=", ".join(changes),
                do="change the numbers themselves, with dataclasses.replace",
            )
        numbers = preset if isinstance(preset, Preset) else find_preset(str(preset), changes)
        bundle = choose_loras(
            opened_model(model, draft, highres, told),
            lora_files(loras) or [],
            lora_files(loras_highres),
        )
        return cls(
            bundle,
            numbers,
            options,
            usual_codec=usual_codec,
            reporter=told,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
        )

    @property
    def preset(self) -> Preset:
        """The numbers of the clips, where a call does not change them."""
        return self._preset

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self._options.torch_device

    @property
    def bundle(self) -> Bundle:
        """The model."""
        return self._bundle

    @overload
    def __call__(self, prompt: str, **options: Unpack[CallOptions]) -> PipelineOutput: ...

    @overload
    def __call__(
        self, prompt: list[str] | tuple[str, ...], **options: Unpack[CallOptions]
    ) -> list[PipelineOutput]: ...

    def __call__(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_frames: int | None = None,
        image: StartPicture | None = None,
        draft_only: bool = False,
        draft_video: str | Path | None = None,
        draft_strength: float | None = None,
        output: str | Path | None = None,
        output_type: OutputType | None = None,
        overwrite: bool = False,
        callback: Callback | None = None,
    ) -> PipelineOutput | list[PipelineOutput]:
        """Make a clip, or a list of clips: those of one `pw generate` over these prompts.

        Args:
            prompt: what to show; of a list every element.
            negative_prompt: what not to show; None: the official one.
            seed: base seed; a negative one is drawn.
            num_inference_steps: of the last stage; None: as in the preset.
            guidance_scale: of the last stage; None: as in the preset.
            num_frames: 4 n + 1; None: as in the preset.
            image: first frame of every clip: a path, an image of Pillow, or [H, W, 3] uint8.
            draft_only: stop after the draft; the clip shows it.
            draft_video: file whose frames take the place of the draft, of every clip of a list.
            draft_strength: noise level, 0 to 1, at which the draft begins with that video; at 0
                the video is the draft, at 1 nothing of it is left. None: as in the options, 0.
            output: a video file (.mp4, or .mkv with options.codec "ffv1") or a picture (.png with
                "png" and one frame); for a list, and where the name has none of these endings, a
                folder for `<number>.mp4`. None: frames, no file.
            output_type: of the frames: "np" (the default), "pt" or "pil".
            overwrite: replace files of other clips, which are refused otherwise; a clip that is
                finished there already is not made again.
            callback: called after every block with a `Progress`; if it returns False, or raises,
                the call ends.

        Raises:
            BadRequest, BadWeights: the request or the bundle cannot work.
            BadResult: the clip failed. Of a list, the output of the clip has the error.
            Cancelled: `cancel` was called, or the callback returned False.
        """
        require_texts(prompt)
        require_callable(callback)
        require_kinds(
            negative_prompt=negative_prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_frames=num_frames,
            output=output,
            draft_video=draft_video,
            draft_strength=draft_strength,
        )
        if output_type is not None:
            check_output_type(output_type)
            if output is not None:
                raise BadRequest(
                    "a call writes a video or returns frames, and both are asked for",
                    got=f"output={str(output)!r} and output_type={output_type!r}",
                    do="leave one of them out; codec ffv1 writes the same frames, without loss",
                )
        single, texts = isinstance(prompt, str), [prompt] if isinstance(prompt, str) else prompt
        draft_only = draft_only or self._options.draft_only
        preset = with_numbers(
            self._preset,
            draft_only=draft_only,
            steps=num_inference_steps,
            guidance=guidance_scale,
            frames=num_frames,
        )
        options = replace(self._options, draft_only=draft_only, codec=self._codec(preset, output))
        if draft_strength is not None:
            options = replace(options, draft_strength=float(draft_strength))
        target = target_of(output, texts, options, single=single)
        request = replace(
            self.request("", negative_prompt, seed),
            preset=preset,
            out=target.folder,
            options=options,
            overwrite=overwrite,
        )
        with picture_file(image) as start:
            video = None if draft_video is None else Path(draft_video)
            prompts = started_from(target.prompts, image=start, draft_video=video)
            request = replace(request, prompts=prompts)
            if output is None:
                outputs = self._frames(request, output_type or "np", callback)
            else:
                outputs = [written(request, x) for x in self.run(request, callback)]
        outputs = [replace(x, prompt=text) for x, text in zip(outputs, texts, strict=True)]
        if not single:
            return outputs
        if outputs[0].error is not None:
            raise BadResult(outputs[0].error)
        return outputs[0]

    def cancel(self) -> None:
        """End the call in progress, within a block; callable from any thread."""
        stop = self._stop
        if stop is not None:
            stop.request()

    def close(self) -> None:
        """Release the networks, after the call in progress. No call can follow."""
        with self._alone():
            if self._warm is not None:
                self._warm.release()
                self._warm = None
                free_memory(self._options.torch_device)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def request(self, prompt: str, negative: str | None, seed: int) -> Request:
        """Return the request for a clip of one prompt, without a folder. Raises BadRequest."""
        return Request(
            prompts=(Prompt(prompt.strip()),),  # as the command line does
            preset=self._preset,
            out=Path(),
            negative=OFFICIAL_NEGATIVE if negative is None else negative,
            seed=resolve_base_seed(seed),
            options=self._options,
            gpu_memory=self._gpu_memory,
            host_memory=self._host_memory,
        )

    def _codec(self, preset: Preset, output: str | Path | None) -> Codec:
        """Return the codec of a call: that of the options, or the usual one where none is named."""
        ours = self._options.codec
        named = not self._usual_codec or Path(output or "").suffix.lower() == suffix(ours)
        return ours if named else preset.video.usual_codec

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no pipeline makes a call. Raises BadRequest within one of this pipeline."""
        with _CALLS:
            if self._stop is not None:
                raise BadRequest(
                    "the callback of a call uses the same pipeline",
                    do="call or close it when that call has ended: return False to end it",
                )
            yield

    def _frames(
        self, request: Request, kind: OutputType, callback: Callback | None
    ) -> list[PipelineOutput]:
        """Run with the frames in memory."""
        held = HeldFrames()
        outcomes = self.run_in_memory(request, callback, {**STAGES, "decode": held.stage})
        return [
            PipelineOutput(
                prompt=outcome.prompt.text,
                seed=request.seed,
                fps=request.preset.video.fps,
                frames=None if outcome.error else as_output(held.frames[outcome.prompt.id], kind),
                error=outcome.error,
            )
            for outcome in outcomes
        ]

    def run_in_memory(
        self,
        request: Request,
        callback: Callback | None,
        stages: Mapping[str, Callable[[Run], None]],
    ) -> tuple[Outcome, ...]:
        """Run with stages that leave no file; what the others write is gone afterwards.

        It stays where a clip has failed, or the run was interrupted, with a draft or more of a clip
        there, of which the user was told. Arguments and errors are those of `run`.
        """
        folder, complete = Path(tempfile.mkdtemp(prefix="pw-frames-")), False
        request, stop = replace(request, out=folder, in_memory=True), StopRequest()
        try:
            outcomes = self.run(request, callback, stages, forgetting=stop)
            complete = all(outcome.error is None for outcome in outcomes)
            return outcomes
        finally:
            kept = (file for file in folder.glob(f"*{SUFFIX}") if stages_of(file))
            if complete or stop.requested or next(kept, None) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def run(
        self,
        request: Request,
        callback: Callback | None = None,
        stages: Mapping[str, Callable[[Run], None]] | None = None,
        *,
        forgetting: StopRequest | None = None,
    ) -> tuple[Outcome, ...]:
        """Run a request with the networks that are loaded, one call at a time.

        Args:
            request: what to make.
            callback: as for a call.
            stages: as for `pw_runtime.generate`.
            forgetting: stops it; its folder is then gone, and what is kept there is not told.

        Raises:
            Those of a call, and what the callback raises.
        """
        with self._alone():
            if self._warm is None:
                raise BadRequest("the pipeline is closed", do="make another one")
            self._stop = stop = forgetting or StopRequest()
            forgets = forgetting is not None
            self._reporter.begin()
            reporter = CallReporter(self._reporter, callback, stop, forgets=forgets)
            try:
                outcomes = generate(
                    request, self._bundle, reporter, warm=self._warm, stop=stop, stages=stages
                )
            except Stopped as stopped:
                if reporter.failure is None:
                    raise Cancelled("the call was cancelled") from stopped
            finally:
                self._stop = None
            if reporter.failure is not None:  # perhaps at the last report, when nothing was left
                raise reporter.failure
            return outcomes
