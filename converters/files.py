"""Files and directories shared by every converter: safe names, byte ranges, staged output, companion files.

Nothing here knows a checkpoint format.
"""

import errno
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import OutputError, UserError

COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""What travels beside the weights. Never weights, their index, Python files or pickles."""

_MAX_SHOWN = 200


def shown(name: object) -> str:
    """A name from a file as one short printable line, fit for an error message."""
    text = str(name)
    return text if text.isprintable() and len(text) <= _MAX_SHOWN else repr(text)[:_MAX_SHOWN]


def and_more(names: Sequence[str]) -> str:
    """ " (and 3 more)" for the names behind the first; empty when there are none."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def inside(directory: Path, name: str, *, error: type[UserError]) -> Path:
    """The path of the regular file `name` in `directory`; raises `error` if it escapes, is missing or is no
    file.

    A symbolic link must stay inside the directory. The one exception is the Hugging Face hub cache, whose
    `snapshots/<revision>/<file>` are links to `blobs/<hash>` of the same repository.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or Path(name).is_absolute():
        raise error(
            f"{directory}: {shown(name)} is not a plain file name; files outside the directory are not read"
        )
    path, base = directory / name, directory.resolve()
    if not path.exists():
        raise error(f"{shown(path)} does not exist; the directory is incomplete, copy or download it again")
    target = path.resolve()
    blobs = base.parent.parent / "blobs"
    in_cache = base.parent.name == "snapshots" and target.is_relative_to(blobs.resolve())
    if not (target.is_relative_to(base) or in_cache):
        raise error(
            f"{shown(path)} is a link to {shown(target)}, outside its directory; replace it with the file"
        )
    if not target.is_file():  # a named pipe would block the open for ever
        raise error(f"{shown(path)} is not a regular file")
    return path


def map_bytes(path: Path, start: int, length: int) -> memoryview:
    """Bytes [start, start + length) of a file, mapped and not read.

    The mapping is private (copy on write), which gives torch the writable memory that it wants, and lives as
    long as the view: memory in use is that of the tensors in use. Raises OSError, or ValueError if the file
    is shorter.
    """
    if length == 0:
        return memoryview(bytearray())
    before = start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
    return memoryview(mapping)[before:]


def tensor_from(view: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor on the memory of `view`; a copy only where the bytes are not aligned for `dtype`."""
    if not len(view):
        return torch.empty(tuple(shape), dtype=dtype)
    data = torch.frombuffer(view, dtype=torch.uint8)
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(tuple(shape))


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, durably."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(path)


def check_free_space(directory: Path, needed: int, *, what: str = "the output", remedy: str = "") -> None:
    """Raise OutputError when the file system has less than `needed` bytes left: better now than after an
    hour. `what` needs them; `remedy` is what else the user can do.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OutputError(
            f"disk full: {directory} has {free / 1e9:.3f} GB free, {what} needs {needed / 1e9:.3f} GB; "
            f"make room{remedy}"
        )


@contextmanager
def staged_directory(final: str | Path) -> Iterator[Path]:
    """A directory to write into that becomes `final` when the block ends, and vanishes when it fails.

    Raises OutputError if `final` exists and is not an empty directory, if it cannot be written, or if the
    disk is full. The staging directory `.<name>.partial-<pid>` is a sibling, so that `final` appears in one
    rename.
    """
    target = Path(final).resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"{final} is a file; choose another output directory")
    with _output_errors(target):
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(f"{final} is not empty; choose a new output directory or remove it")
        # A mount point cannot be replaced; the working directory should not be pulled from under the user.
        nested = target.is_dir() and (os.path.ismount(target) or target == Path.cwd())
        stage = (target if nested else target.parent) / f".{target.name}.partial-{os.getpid()}"
        try:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            yield stage
            fsync(stage)
            if nested:
                for child in stage.iterdir():
                    child.rename(target / child.name)
            else:
                stage.rename(target)
            fsync(target.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Turns what the operating system refuses while writing into an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"disk full while writing {target}; make room or choose another directory"
            ) from error
        place = f" ({shown(error.filename)})" if error.filename else ""
        raise OutputError(f"{target} cannot be written: {error.strerror or error}{place}") from error


def companion_names(source_dir: Path) -> list[str]:
    """Names of the files in `source_dir` that belong beside the weights, sorted."""
    names = sorted(entry.name for entry in source_dir.iterdir())
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS)]


def copy_companions(
    source_dir: str | Path, target_dir: str | Path, *, error: type[UserError] = UserError
) -> list[str]:
    """Copy configuration, tokenizer, chat template and licence byte by byte; returns the names copied.

    Raises `error` for a file that is a link out of `source_dir`.
    """
    source, target = Path(source_dir), Path(target_dir)
    names = companion_names(source)
    for name in names:
        shutil.copyfile(inside(source, name, error=error), target / name)
        fsync(target / name)
    return names
