"""What a directory of weights says of itself: where it came from, and the SHA-256 of every file in it."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from engine.errors import CheckpointError
from engine.storage.durable import write_whole

MANIFEST_FILE = "braid-manifest.json"
STATE_FILE = "trainer_state.json"
"""Where a run stands, in its checkpoints; `engine.training.resume` writes and reads it."""

_FORMAT = 1
_BLOCK = 8_000_000

Problem = Literal["missing", "size", "sha256", "surplus"]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """What the directory was made from."""

    path: str
    sha256: str
    """`model_digest` of what was read."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `braid-manifest.json`."""

    kind: str
    """What the directory is: "training", or what a conversion made, as "mcore" or "hf"."""
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    """By path within the directory, with slashes; all files but the manifest itself."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """UTC, ISO 8601."""
    command: str = ""
    plan: str = ""
    """Digest of the plan that a conversion was written by; the same source and options give the same."""
    source: SourceEntry | None = None
    """What a conversion read."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each tensor that was read, by Hugging Face name, as it was stored."""


@dataclass(frozen=True, kw_only=True)
class FileProblem:
    """A file that is not what the manifest says."""

    name: str
    problem: Problem
    expected: str = ""
    found: str = ""

    def line(self) -> str:
        """For an error message, behind the file's name."""
        if self.problem == "missing":
            return "the file is missing"
        if self.problem == "surplus":
            return "the file does not belong here"
        if self.problem == "size":
            return f"the file has {self.found} bytes of {self.expected}"
        return "the content is not what was written (its SHA-256 differs)"


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of installed packages; "unknown" for what is there but not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def model_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """SHA-256 of a model, whatever the files and the format it lies in: of one line a tensor, sorted by name,
    `name dtype d0,d1 sha256`. `tensors` gives (dtype, shape, SHA-256 of the bytes in row-major order).
    """
    lines = sorted(
        f"{name} {dtype} {','.join(map(str, shape))} {digest}\n"
        for name, (dtype, shape, digest) in tensors.items()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file. OSError comes from the disk."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def hash_files(directory: Path, names: Sequence[str], *, workers: int = 1) -> dict[str, FileEntry]:
    """`hash_file` of several, by name."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(hash_file, (directory / name for name in names)), strict=True))


def files_below(directory: Path) -> list[str]:
    """Every file of a directory and below but the manifest, as sorted paths with slashes."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != MANIFEST_FILE)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it durably, under its name only when it is whole. OSError comes from the disk."""
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False)
    write_whole(directory / MANIFEST_FILE, f"{text}\n".encode())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory. Raises CheckpointError if there is none, or it is torn or of another
    format.
    """
    path = directory / MANIFEST_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != _FORMAT:
            raise CheckpointError(f"{path} has not the format {_FORMAT}; use the braid version that wrote it")
        files = {_inner(name): FileEntry(**entry) for name, entry in value.pop("files").items()}
        source = value.pop("source")
        manifest = Manifest(files=files, source=SourceEntry(**source) if source else None, **value)
        _check_types(manifest)
        return manifest
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {MANIFEST_FILE}; it was not written by braid, or its writing was interrupted"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is damaged ({reason}); the directory cannot be trusted") from error


def _check_types(manifest: Manifest) -> None:
    """Raise TypeError for values of other types than the fields have: JSON can hold anything."""
    texts = [manifest.kind, manifest.created, manifest.command, manifest.plan]
    for mapping in (manifest.versions, manifest.tensors):
        if not isinstance(mapping, dict):
            raise TypeError("a list of names has no names")
        texts += mapping.values()
    if manifest.source is not None:
        texts += [manifest.source.path, manifest.source.sha256]
    texts += [entry.sha256 for entry in manifest.files.values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is none")
    if not all(type(entry.bytes) is int and entry.bytes >= 0 for entry in manifest.files.values()):
        raise TypeError("a size is none")


def _inner(name: str) -> str:
    """A path that stays inside the directory."""
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r} leaves the directory")
    return name


def check_manifest(
    directory: Path, manifest: Manifest, *, workers: int = 1, hashed: Callable[[str], bool] = bool
) -> list[FileProblem]:
    """Every file that is missing, surplus, of another size or, where `hashed(name)`, of another SHA-256;
    empty if all is well.
    """
    found, problems, to_hash = set(files_below(directory)), [], []
    for name, entry in manifest.files.items():
        if name not in found or not (directory / name).exists():  # or a link to nowhere
            problems.append(FileProblem(name=name, problem="missing"))
        elif (size := (directory / name).stat().st_size) != entry.bytes:
            problems.append(
                FileProblem(name=name, problem="size", expected=str(entry.bytes), found=str(size))
            )
        elif hashed(name):
            to_hash.append(name)
    for name, entry in hash_files(directory, to_hash, workers=workers).items():
        expected = manifest.files[name].sha256
        if entry.sha256 != expected:
            problems.append(FileProblem(name=name, problem="sha256", expected=expected, found=entry.sha256))
    problems += [FileProblem(name=name, problem="surplus") for name in sorted(found - manifest.files.keys())]
    return problems


def check_share(directory: Path, rank: int, size: int) -> str | None:
    """One rank's share of checking that every file is what was written: one line on what is not, or None."""
    try:
        manifest = read_manifest(directory)
        names = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))[rank::size]
        mine = replace(manifest, files={name: manifest.files[name] for name in names})
        problems = [item for item in check_manifest(directory, mine) if item.problem != "surplus"]
    except (CheckpointError, OSError) as error:
        return f"{directory}: {error}"
    return f"{directory / problems[0].name}: {problems[0].line()}" if problems else None
