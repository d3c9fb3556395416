"""A conversion of any kind: what is read, which files it becomes, and carrying that out."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converters.source import Source
from converters.stage import clear_leftovers, stage_for, staged_directory, wait_for
from converters.transfer import (
    RECORDS_DIR,
    FileRecord,
    OutputFile,
    TensorData,
    TransferOptions,
    read_record,
    write_files,
)
from engine.errors import CheckpointError, OutputError
from engine.storage.files import check_free_space, dtype_name
from engine.storage.manifest import (
    FileEntry,
    Manifest,
    SourceEntry,
    files_below,
    hash_files,
    model_digest,
    read_manifest,
    versions_of,
    write_manifest,
)

Kind = Literal["mcore", "hf", "merged", "peft", "mcore-adapter"]
"""A merged directory is a Hugging Face directory whose source is no model that lies anywhere: a sum."""
_SMALL_FILES = 32_000_000
"""Room for what lies beside the weights: tokenizer, configuration, metadata."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A directory before it is written. Everything that can be wrong with the source has been looked at, but
    for its data.
    """

    kind: Kind
    source: Source
    files: tuple[OutputFile, ...]
    """The files of weights."""
    tensors: int
    """Tensors that the output has."""
    finish: Callable[[Path], None]
    """Writes what lies beside the weights into the staged directory."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        parts = (part for file in self.files for part in file.parts)
        return sum(part.nbytes for part in parts if isinstance(part, TensorData))

    def digest(self) -> str:
        """The same for the same source files, output files and versions: what a second attempt goes by."""
        digest = hashlib.sha256(repr((self.kind, _versions(), self.files)).encode())
        for path in self.source.files():
            state = path.stat()
            digest.update(repr((str(path.resolve()), state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What a conversion wrote."""

    output_dir: Path
    tensors: int
    bytes: int
    """Bytes of tensor data."""
    seconds: float

    def line(self) -> str:
        """For the terminal."""
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        return (
            f"{self.output_dir}: {self.tensors} tensors, {self.bytes / 1e9:.3f} GB in {self.seconds:.2f} s "
            f"({rate:.2f} GB/s)"
        )


def carry_out(
    conversion: Conversion,
    output_dir: str | Path,
    *,
    options: TransferOptions | None = None,
    command: str = "",
) -> ConvertReport:
    """Write the output directory, with a manifest that records `command`.

    In a crew of several processes every one calls this with the same conversion; rank 0 waits for the others
    and finishes. Raises the UserErrors of the source, and OutputError for the target; a failure leaves
    nothing behind, and an interruption leaves what the next attempt goes on with.
    """
    started, options, plan = time.monotonic(), options or TransferOptions(), conversion.digest()
    crew, target = options.crew, Path(output_dir)
    if not (crew.rank and _is_done(target, plan)):
        with staged_directory(target, plan=plan, crew=crew) as stage:
            if crew.size == 1:  # otherwise others may be writing
                clear_leftovers(stage, conversion.files)
            if crew.rank == 0:
                check_free_space(stage.parent, _needed(conversion, stage))
            write_files(conversion.files, stage, conversion.source, options)
            if crew.rank == 0:
                wait_for(conversion.files, stage, crew)
                clear_leftovers(stage, conversion.files)
                records = {file.name: _recorded(stage, file) for file in conversion.files}
                conversion.finish(stage)
                write_manifest(stage, _manifest(conversion, stage, records, plan=plan, command=command))
    return ConvertReport(
        output_dir=target,
        tensors=conversion.tensors,
        bytes=conversion.nbytes,
        seconds=time.monotonic() - started,
    )


def check_output(conversion: Conversion, output_dir: str | Path) -> int:
    """Raise OutputError for a target that `carry_out` would refuse before it writes; the bytes that it would
    write, without what an interrupted conversion has left.
    """
    stage = stage_for(output_dir, plan=conversion.digest())
    home = next(place for place in stage.parents if place.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise OutputError(f"{output_dir} cannot be written: {home} is no directory to write in")
    needed = _needed(conversion, stage)
    check_free_space(home, needed)
    return needed


def _needed(conversion: Conversion, stage: Path) -> int:
    missing = (file.nbytes for file in conversion.files if read_record(stage, file) is None)
    return sum(missing) + _SMALL_FILES


def _is_done(target: Path, plan: str) -> bool:
    """Whether rank 0 has finished already, on the word that this rank left in an earlier start of the job."""
    try:
        return read_manifest(target).plan == plan
    except CheckpointError:
        return False


def _recorded(stage: Path, file: OutputFile) -> FileRecord:
    record = read_record(stage, file)
    assert record is not None, file.name
    return record


def _versions() -> dict[str, str]:
    return versions_of(("braid", "torch"))


def _manifest(
    conversion: Conversion, stage: Path, records: Mapping[str, FileRecord], *, plan: str, command: str
) -> Manifest:
    source = conversion.source
    tensors = {name: digest for record in records.values() for name, digest in record.tensors.items()}
    described = {
        name: (dtype_name(source.dtype(name)), source.shape(name), digest) for name, digest in tensors.items()
    }
    files = {name: FileEntry(bytes=record.nbytes, sha256=record.sha256) for name, record in records.items()}
    others = [n for n in files_below(stage) if n not in files and not n.startswith(f"{RECORDS_DIR}/")]
    return Manifest(
        kind=conversion.kind,
        command=command,
        versions=_versions(),
        plan=plan,
        source=SourceEntry(path=str(source.directory.resolve()), sha256=model_digest(described)),
        tensors=dict(sorted(tensors.items())),
        files=dict(sorted((files | hash_files(stage, others)).items())),
    )
