# SPDX-License-Identifier: Apache-2.0
"""`pw verify`: clips, receipts and latents against each other, and against their bundle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from pw_runtime.checkpoint.bundle import Bundle, sha256_of, verify
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.job.clip import FRAMES, STEPS, TILES
from pw_runtime.job.latents import NO_DIGESTS, SUFFIX, check_latents
from pw_runtime.job.provenance import source_digests, without_paths
from pw_runtime.job.recorded import Recorded, RecordedFile, read_recorded
from pw_runtime.stages.codecs import PICTURE, VIDEOS
from pw_runtime.stages.fragmented_mp4 import PARTIAL
from pw_runtime.system.atomic_files import partial_of
from pw_runtime.system.input_files import UnreadableInput, read_json
from pw_runtime.system.tile_store import STATE
from pw_runtime.system.video_input import VideoFacts, decoded_facts

FaultKind = Literal["missing", "altered", "unreadable", "another model", "orphaned", "unfinished"]
RECEIPT: Final = ".json"
# Of files that an unfinished clip leaves beside the names above; the longer endings first.
CLIPS: Final = (*VIDEOS, PICTURE)
LEFT: Final = (SUFFIX, STEPS, FRAMES, TILES + STATE, TILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with a clip or a bundle."""

    kind: FaultKind
    text: str

    def __str__(self) -> str:
        """Return the fault in a line."""
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Result for one clip, or for the bundle.

    Attributes:
        name: path of the clip's first file, or of the bundle.
        content: of the video, in a line; None where it could not be decoded.
        faults: everything that is wrong; none for a clip that is as its receipt says.
        unchecked: what could not be checked, and why.
    """

    name: str
    content: str | None = None
    faults: tuple[Fault, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFiles:
    """Files of one clip in a folder."""

    folder: Path
    id: str
    names: frozenset[str]

    def path(self, ending: str) -> Path:
        """Return `FOLDER/<id><ending>`."""
        return self.folder / f"{self.id}{ending}"

    @property
    def videos(self) -> list[Path]:
        """Its finished videos; one, unless something is wrong."""
        return [self.path(ending) for ending in CLIPS if f"{self.id}{ending}" in self.names]

    @property
    def left(self) -> list[str]:
        """Names of what a run that did not end leaves."""
        finished = {f"{self.id}{ending}" for ending in (*CLIPS, RECEIPT, SUFFIX)}
        return sorted(self.names - finished)

    def has(self, ending: str) -> bool:
        """Tell whether the clip has the file of that ending."""
        return f"{self.id}{ending}" in self.names


def find_clips(path: Path) -> list[ClipFiles]:
    """Return the clips of a folder in the order of their names, or the one that a file belongs to.

    Raises BadRequest where `path` is neither, and for a folder without clips.
    """
    if os.path.isdir(path):
        clips = _clips_of(path)
        if not clips:
            raise BadRequest(
                f"no clips in {path}", wanted=f"files ending in {', '.join((*CLIPS, RECEIPT))}"
            )
        return clips
    endings = (*LEFT, *CLIPS, RECEIPT)
    named = any(path.name.endswith(x) and path.name != x for x in endings)
    if not (os.path.isfile(path) and named):
        raise BadRequest(
            f"{path} is no clip and no receipt",
            got="another kind of file" if os.path.exists(path) else "no such file",
            wanted=f"a file ending in {', '.join((*CLIPS, RECEIPT))}, or a folder of them",
        )
    return [clip for clip in _clips_of(path.parent, path.name) if path.name in clip.names]


def _clips_of(folder: Path, also: str | None = None) -> list[ClipFiles]:
    """Group the files of a folder by clip; `also` counts as a clip's file whatever it contains."""
    entries = list(folder.iterdir())
    names = sorted(x.name for x in entries if x.is_file() or partial_of(x.name))
    groups: dict[str, set[str]] = {}
    for name in names:
        owner = _owner(name, set(names))
        if owner is None:
            continue
        if name.endswith(RECEIPT) and name != also and not _is_receipt(folder / name, names):
            continue  # why silent: a folder may hold other JSON, such as results
        if name.endswith(PICTURE) and name != also and not _has_receipt(folder / name, names):
            continue  # why silent: a folder may hold other pictures, such as contact sheets
        groups.setdefault(owner, set()).add(name)
    return [ClipFiles(folder=folder, id=x, names=frozenset(groups[x])) for x in sorted(groups)]


def _is_receipt(path: Path, names: Iterable[str]) -> bool:
    """Tell whether a JSON file is a receipt, or stands where one must be."""
    if any(f"{path.stem}{ending}" in names for ending in VIDEOS):
        return True
    try:
        content = read_json(path)
    except UnreadableInput:
        return f"{path.stem}{PICTURE}" in names
    return isinstance(content, dict) and content.keys() >= {"prompt", "video", "bundle"}


def _has_receipt(path: Path, names: Iterable[str]) -> bool:
    """Tell whether a picture has a receipt beside it, so that it is a clip of one frame."""
    receipt = path.with_suffix(RECEIPT)
    return receipt.name in names and _is_receipt(receipt, names)


def _owner(name: str, names: set[str]) -> str | None:
    """Return the id of the clip that a file belongs to; None for a file of something else."""
    if partial := partial_of(name):  # a file that was being written
        return _owner(partial, names)
    for ending in VIDEOS:
        stem = name.removesuffix(PARTIAL + ending)
        if stem and stem != name and f"{stem}{PARTIAL}{RECEIPT}" not in names:
            return stem
    endings = (*LEFT, *CLIPS, RECEIPT)
    return next((name.removesuffix(x) for x in endings if name.endswith(x) and name != x), None)


def verify_clip(files: ClipFiles, bundle: Bundle | None) -> Verdict:
    """Check a clip's files against each other, and against the digests of `bundle`, if given."""
    check = _Check(files)
    recorded = check.receipt()
    if recorded is not None:
        check.video(recorded)
        check.latents(recorded)
        if bundle is not None:
            check.model(recorded, bundle)
    check.leftovers(finished=recorded is not None and bool(files.videos))
    first = (*files.videos, files.path(RECEIPT), files.folder / min(files.names))
    return Verdict(
        name=str(next(path for path in first if path.name in files.names)),
        content=check.content,
        faults=tuple(check.faults),
        unchecked=tuple(check.unchecked),
    )


def verify_bundle(bundle: Bundle) -> Verdict:
    """Check every file of a bundle against bundle.json."""
    try:
        verify(bundle)
    except BadWeights as error:
        fault = Fault(kind="altered", text=f"{error.what}: {error.got}")
        return Verdict(name=str(bundle.root), faults=(fault,))
    return Verdict(name=str(bundle.root), content=f"{len(bundle.files)} files")


class _Check:
    """Checks of one clip, and what they found."""

    def __init__(self, files: ClipFiles) -> None:
        self.files = files
        self.faults: list[Fault] = []
        self.unchecked: list[str] = []
        self.content: str | None = None

    def fault(self, kind: FaultKind, text: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(kind=kind, text=text))

    def receipt(self) -> Recorded | None:
        """Read the receipt; None where there is none that can be used."""
        files = self.files
        if not files.has(RECEIPT):
            for video in files.videos:
                self.fault("orphaned", f"{video.name} has no receipt {files.id}{RECEIPT}")
                self._decode(video)
            return None
        try:
            return read_recorded(files.path(RECEIPT))
        except BadRequest as error:
            self.fault("unreadable", f"{files.id}{RECEIPT}: {error.got}")
            return None

    def video(self, recorded: Recorded) -> None:
        """Check the video file: there, of its digest, decodable, of its size, length and speed."""
        name = recorded.video.file
        path = self.files.folder / name
        for other in self.files.videos:
            if other.name != name:
                self.fault("orphaned", f"{other.name} is not what the receipt names, {name}")
        if not path.is_file():
            self.fault("missing", f"{name}, which the receipt names")
            return
        self._digest(path, recorded.video, "the video")
        decoded = self._decode(path)
        stage, video = recorded.stage, recorded.preset.video
        promised = VideoFacts(
            width=stage.width,
            height=stage.height,
            frames=video.frames,
            fps=None if path.suffix == PICTURE else float(video.fps),
        )
        if decoded is not None and replace(decoded, codec=None) != promised:
            self.fault("altered", f"{name} has {decoded}, its receipt {promised}")

    def _decode(self, path: Path) -> VideoFacts | None:
        try:
            facts = decoded_facts(path)
        except BadRequest as error:
            self.fault("unreadable", f"{path.name}: {error.got}")
            return None
        self.content = str(facts)
        return facts

    def _digest(self, path: Path, described: RecordedFile, what: str) -> None:
        """Compare a file with its size and digest in the receipt, as far as it has them."""
        size = path.stat().st_size
        if described.bytes not in (None, size):
            self.fault("altered", f"{path.name} has {size} bytes, wanted {described.bytes}")
        elif described.sha256 is None:
            self.unchecked.append(f"{what}'s digest, which receipts of earlier versions lack")
        elif (found := sha256_of(path)) != described.sha256:
            self.fault("altered", f"{path.name} has SHA-256 {found}, wanted {described.sha256}")

    def latents(self, recorded: Recorded) -> None:
        """Check the latents file, where one was kept or lies there."""
        path = recorded.latents_beside(self.files.path(RECEIPT))
        if not path.is_file():
            if recorded.latents:
                self.fault("missing", f"{path.name}, which the receipt names")
            return
        if recorded.latents:
            self._digest(path, recorded.latents, "the latents")
        try:
            origin = check_latents(path, None)
        except BadRequest as error:
            self.fault("altered", f"{error.what}: {error.got}")
            return
        if NO_DIGESTS in origin.notices:
            self.unchecked.append(f"the tensors of {path.name}, a format without digests")
        stored = {
            "prompt": (without_paths(origin.prompt), without_paths(recorded.prompt)),
            "sources": (source_digests(origin.sources), source_digests(recorded.sources)),
            "negative": (origin.negative, recorded.negative),
            "seeds": (origin.seeds, recorded.seeds),
            "noise": (origin.noise, recorded.noise),
            "bundle": (origin.bundle, recorded.bundle),
        }
        if differing := [name for name, (left, right) in stored.items() if left != right]:
            other = f"{path.name} and the receipt have another {', '.join(differing)}"
            self.fault("altered", f"{other}: they are of two clips")

    def model(self, recorded: Recorded, bundle: Bundle) -> None:
        """Compare the digests that the receipt has with those of a bundle."""
        if recorded.bundle["digest"] == bundle.digest:
            return
        names = recorded.bundle.keys() | bundle.files.keys()
        here = {name: record.sha256 for name, record in bundle.files.items()}
        differing = [x for x in names if x != "digest" and recorded.bundle.get(x) != here.get(x)]
        files = ", ".join(sorted(differing)) or "no weights, but bundle.json"
        self.fault("another model", f"made with another bundle than {bundle.root}: {files} differ")

    def leftovers(self, *, finished: bool) -> None:
        """Name what an unfinished run left."""
        if not finished and self.files.has(SUFFIX):
            self.fault("unfinished", f"{self.files.id}{SUFFIX} is of a clip that is not there")
        for name in self.files.left:
            self.fault("unfinished", f"{name}, left by a run that was killed, or still being made")


def verify_all(paths: Iterable[Path], bundle: Bundle | None) -> Iterator[Verdict]:
    """Check the bundle, if given, then every clip of `paths`, each once. Raises BadRequest."""
    clips = [clip for path in paths for clip in find_clips(path)]  # before hours of hashing
    if bundle is not None:
        yield verify_bundle(bundle)
    for clip in dict.fromkeys(clips):
        yield verify_clip(clip, bundle)
