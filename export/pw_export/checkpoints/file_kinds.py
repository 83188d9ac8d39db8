# SPDX-License-Identifier: Apache-2.0
"""Name a file by its content, so that one without tensors is named for what it is."""

from __future__ import annotations

import json
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Literal

from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

Form = Literal["safetensors", "zip", "pickle"]

DOWNLOAD = "download it again from its publisher"
_WANTED = "tensors: a .safetensors file or a PyTorch checkpoint"
_UNPACK = "unpack it and pass the weight file inside"
_OTHER = "pass the weight file of Wan2.2-TI2V-5B or PixelWizard"
_HEAD_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself
_LFS = b"version https://git-lfs.github.com/spec/"

_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)

# Offset, bytes there, what such a file is, what to do.
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (
        0,
        b"GGUF",
        "a GGUF file, quantised for llama.cpp and its relatives, which is not read",
        "take the .safetensors or .pth file of the same model",
    ),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", _OTHER),
    (0, b"\x93NUMPY", "a NumPy array", _OTHER),
    (0, b"ftrt", "a TensorRT engine", _OTHER),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", _OTHER),
    (0, b"\xff\xd8\xff", "a JPEG picture", _OTHER),
    (4, b"ftyp", "an mp4 video", _OTHER),
    (0, b"\x7fELF", "a program", _OTHER),
    (0, b"%PDF", "a PDF document", _OTHER),
)


def form_of(path: Path) -> Form:
    """Return the container of a tensor file, told by its content and never by its name.

    Raises BadWeights for what is missing, not a plain file, cut short, or something else than
    tensors; the message says what it is.
    """
    size = require_regular(path)
    with _opened(path) as file:
        head = file.read(_HEAD_BYTES)
    if head[:4] == b"PK\x03\x04":
        _require_torch_archive(path)
        return "zip"
    if len(head) > 8 and head[8:9] == b"{" and _header_bytes(head) <= _MAX_HEADER_BYTES:
        _require_all_bytes(path, _header_bytes(head), size)
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05" and any(head[2:]):
        return "pickle"
    what, remedy = _described(head)
    raise BadWeights(f"{path} cannot be read", got=what, wanted=_WANTED, do=remedy)


def require_regular(path: Path, *, wanted: str = "a weight file") -> int:
    """Return the size in bytes of a plain file. Raises BadWeights for anything else."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "a path that cannot exist"
        if path.is_symlink():
            reason = "a symbolic link to a file that is not there"
        raise _unreadable(path, f"{reason}{_beside(path)}", wanted) from error
    if stat.S_ISDIR(state.st_mode):
        raise _unreadable(path, f"a folder, with {listing(path)}", wanted)
    if not stat.S_ISREG(state.st_mode):
        raise _unreadable(path, "a named pipe, a socket or a device", wanted)
    return state.st_size


def remains_of_download(path: Path) -> tuple[str, str] | None:
    """Say what stands in place of a file that was not downloaded, and what to do; else None.

    Raises BadWeights for what is no plain file.
    """
    require_regular(path)
    with _opened(path) as file:
        head = file.read(_HEAD_BYTES)
    whole = any(head) and not head.startswith(_LFS) and not _WEB_PAGE.match(head)
    return None if whole else _described(head)


def listing(folder: Path) -> str:
    """Return the first few names in a folder, for messages."""
    try:
        return some_names([entry.name for entry in folder.iterdir()]) or "nothing in it"
    except OSError as error:
        return f"a content that cannot be listed ({error.strerror})"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error.strerror or "an error of the file system") from error


def _beside(path: Path) -> str:
    return f"; {path.parent} has {listing(path.parent)}" if path.parent.is_dir() else ""


def _unreadable(path: Path, got: str, wanted: str = "a weight file") -> BadWeights:
    return BadWeights(
        f"{path} cannot be read",
        got=got,
        wanted=wanted,
        do="check the path; if it is right, download the whole checkpoint again",
    )


def _header_bytes(head: bytes) -> int:
    size: int = struct.unpack("<Q", head[:8])[0]
    return size


def _require_all_bytes(path: Path, header_bytes: int, size: int) -> None:
    """Raise BadWeights where a safetensors file is shorter than its header says."""
    wanted = 8 + header_bytes
    if size >= wanted:
        with _opened(path) as file:
            file.seek(8)
            header = file.read(header_bytes)
        try:
            tensors = [entry for name, entry in json.loads(header).items() if name[:2] != "__"]
            ends = [entry["data_offsets"][1] for entry in tensors]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return  # safetensors itself refuses such a header, and numbers that are none
        wanted += max((end for end in ends if isinstance(end, int)), default=0)
    if size < wanted:
        raise BadWeights(
            f"{path} cannot be read",
            got=f"only {size:,} of {wanted:,} bytes",
            wanted="a complete safetensors file",
            do=DOWNLOAD,
        )


def _require_torch_archive(path: Path) -> None:
    """Raise BadWeights where a zip archive was not written by torch.save."""
    got, wanted, remedy = "", "a complete PyTorch checkpoint", DOWNLOAD
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        got = "an archive cut short: the end of the archive is missing"
    else:
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            got, remedy = "a TorchScript program", "save the state_dict of the module instead"
        elif not any(name.endswith("data.pkl") for name in names):
            got, wanted, remedy = f"a zip archive of {some_names(names)}", _WANTED, _UNPACK
    if got:
        raise BadWeights(f"{path} cannot be read", got=got, wanted=wanted, do=remedy)


def require_undamaged(path: Path) -> None:
    """Raise BadWeights where a record of a PyTorch archive contradicts its own checksum.

    It is 0, and says nothing, where torch was told to compute none (`set_crc32_options(False)`).
    """
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.CRC]
        damaged = [record.filename for record in records if not _matches(archive, record)]
    if damaged:
        raise BadWeights(
            f"{path} is damaged",
            got=f"another CRC-32 than when it was saved, of {some_names(damaged)}",
            wanted="a PyTorch checkpoint as it was saved",
            do=DOWNLOAD,
        )


def _matches(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Tell whether a record reads to its end, where its checksum is compared."""
    try:
        with archive.open(record) as file:
            while file.read(2**20):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return False
    return True


def _described(head: bytes) -> tuple[str, str]:
    """Say what a file that begins with `head` is, and what to do about it."""
    if not head:
        return "an empty file", DOWNLOAD
    if not any(head):
        return "zeros: room that a download reserved and never filled", DOWNLOAD
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d{1,18})", head, re.MULTILINE)
        there = f" to {int(size[1]):,} bytes that are not here" if size else ""
        return f"a Git LFS pointer{there}", "run `git lfs pull` in its folder"
    for offset, signature, what, remedy in _SIGNATURES:
        if head[offset:].startswith(signature):
            return what, remedy
    return _described_text(head)


def _described_text(head: bytes) -> tuple[str, str]:
    printable = all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
    if not printable or len(head) < 4:
        return f"unknown content that begins with the bytes {head[:8].hex(' ')}", DOWNLOAD
    if _WEB_PAGE.match(head):
        return "a web page, saved instead of the file it links to", DOWNLOAD
    text = head.decode(errors="replace").strip()
    remedy = "pass a weight file; if this is a server's answer, download the file again"
    return f"text that begins {' '.join(text[:40].split())!r}", remedy
