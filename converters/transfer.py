"""Writing output files from a source: planned byte by byte, in blocks, hashed on the way, several at a time.

A file is written from its first byte to its last, so its SHA-256 costs no second reading; so does that of
every tensor of the source. Reading, writing and both hashes run beside each other. A finished file leaves a
record, which is what an interrupted conversion continues from and what processes on one disk tell each other.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from converters.source import Source
from engine.storage.durable import fsync, write_all, write_whole
from engine.storage.files import bytes_of

RECORDS_DIR = ".records"
DEFAULT_MEMORY = 256_000_000

_MAX_BLOCK = 4_000_000
_BUFFERS = 3
"""Blocks of a worker: one is filled while two are being hashed or written."""
_SYNC_EVERY = 32_000_000
"""Bytes after which a file is sent on its way to the disk, so that little is left to wait for at its end."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a tensor of the source; without a name, rows of zeros."""

    name: str | None
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class TensorData:
    """The bytes of a tensor in an output file: pieces one after another, cast to `dtype`."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    row_elements: int
    copy: bool = False
    """The same rows are written elsewhere too and count there, in the digests of the source."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        rows = sum(piece.stop - piece.start for piece in self.pieces)
        return rows * self.row_elements * self.dtype.itemsize


def whole_tensor(source: Source, name: str, dtype: torch.dtype, *, copy: bool = False) -> TensorData:
    """All rows of a tensor of the source, cast to `dtype`."""
    rows, *rest = source.shape(name)
    pieces = (Piece(name=name, start=0, stop=rows),)
    return TensorData(pieces=pieces, dtype=dtype, row_elements=math.prod(rest), copy=copy)


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file and all of its bytes, in order."""

    name: str
    parts: tuple[bytes | TensorData, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What is known of a file that was written."""

    nbytes: int
    sha256: str
    tensors: Mapping[str, str]
    """SHA-256 of the source's tensors that went into it, by Hugging Face name, in their stored dtype."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The processes that carry out a plan together, on one disk."""

    rank: int = 0
    size: int = 1
    run: str = ""
    """Tells this start of the job from earlier ones, whose failures do not count."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How a conversion runs; nothing here changes what it writes."""

    workers: int = 1
    """Files written at the same time by this process."""
    max_memory: int = DEFAULT_MEMORY
    """Bytes of tensor data held at once, over all workers."""
    crew: Crew = Crew()
    progress: Callable[[int], None] | None = None
    """Called with the bytes written since the last call, from any worker."""

    @property
    def block_bytes(self) -> int:
        """Size of a block. A cast needs the block once more, in either dtype."""
        return max(64_000, min(_MAX_BLOCK, self.max_memory // (self.workers * (_BUFFERS + 2))))


def write_files(
    files: Sequence[OutputFile], stage: Path, source: Source, options: TransferOptions
) -> dict[str, FileRecord]:
    """Write this process's share of `files` into `stage`, but for those that are recorded there as finished.

    Returns the records of the share. OSError comes from the disk, UserErrors from the source.
    """
    (stage / RECORDS_DIR).mkdir(exist_ok=True)
    share = deal(files, options.crew.size)[options.crew.rank]
    records = {file.name: read_record(stage, file) for file in share}
    waiting = [file for file in share if records[file.name] is None]
    if options.progress is not None:
        options.progress(sum(file.nbytes for file in share if records[file.name] is not None))
    stop = threading.Event()

    def write(file: OutputFile) -> FileRecord:
        try:
            return _Writer(stage, file, source, options, stop).run()
        except BaseException:
            stop.set()  # the others need not go on
            raise

    with ThreadPoolExecutor(options.workers, thread_name_prefix="convert") as pool:
        futures = {file.name: pool.submit(write, file) for file in waiting}
        try:
            errors = [error for future in futures.values() if (error := future.exception()) is not None]
        except BaseException:  # interrupted while waiting
            stop.set()
            raise
    if errors:
        raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
    return {name: record or futures[name].result() for name, record in records.items()}


def deal(files: Sequence[OutputFile], count: int) -> list[list[OutputFile]]:
    """Files to processes, the largest first to whoever has least; the same on every process."""
    shares: list[list[OutputFile]] = [[] for _ in range(count)]
    loads = [0] * count
    for file in sorted(files, key=lambda file: -file.nbytes):
        least = loads.index(min(loads))
        shares[least].append(file)
        loads[least] += file.nbytes
    return shares


def read_record(stage: Path, file: OutputFile) -> FileRecord | None:
    """The record of a finished file, if there is one and the file is there in full."""
    try:
        value = json.loads((stage / RECORDS_DIR / f"{file.name}.json").read_text(encoding="utf-8"))
        record = FileRecord(**value)
        size = (stage / file.name).stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return record if size == record.nbytes == file.nbytes else None


class _Stopped(Exception):
    """Another worker has failed."""


class _Writer:
    """Writes one file."""

    def __init__(
        self,
        stage: Path,
        file: OutputFile,
        source: Source,
        options: TransferOptions,
        stop: threading.Event,
    ) -> None:
        self._stage, self._file, self._source, self._options, self._stop = stage, file, source, options, stop
        self._file_hash = hashlib.sha256()
        self._tensor_hashes: dict[str, Any] = {}
        # One thread each, for the blocks of a hash have an order.
        self._file_hasher, self._tensor_hasher, self._syncer = (ThreadPoolExecutor(1) for _ in range(3))
        self._buffers = [torch.empty(options.block_bytes, dtype=torch.uint8) for _ in range(_BUFFERS)]
        self._busy: list[list[Future[None]]] = [[] for _ in self._buffers]
        self._unsynced = 0
        self._sync: Future[None] | None = None

    def run(self) -> FileRecord:
        partial = self._stage / f"{self._file.name}.{os.uname().nodename}-{os.getpid()}"
        try:
            # Unbuffered: blocks are large, and a full disk is then reported where it is met.
            with open(partial, "wb", buffering=0) as out:
                for part in self._file.parts:
                    if isinstance(part, bytes):
                        self._put(out, memoryview(part), self._hash_file(memoryview(part)))
                    else:
                        self._write_tensor(out, part)
                self._settle()
                if self._sync is not None:
                    self._sync.result()
                os.fsync(out.fileno())
            partial.replace(self._stage / self._file.name)
        finally:
            for pool in (self._file_hasher, self._tensor_hasher, self._syncer):
                pool.shutdown()
            partial.unlink(missing_ok=True)
        record = FileRecord(
            nbytes=self._file.nbytes,
            sha256=self._file_hash.hexdigest(),
            tensors={name: value.hexdigest() for name, value in self._tensor_hashes.items()},
        )
        self._keep(record)
        return record

    def _keep(self, record: FileRecord) -> None:
        fsync(self._stage)  # the file's name before the record that vouches for it
        path = self._stage / RECORDS_DIR / f"{self._file.name}.json"
        write_whole(path, json.dumps(vars(record)).encode())

    def _write_tensor(self, out: BinaryIO, data: TensorData) -> None:
        for piece, buffer, first, last in self._blocks(data):
            for future in self._busy[buffer]:
                future.result()
            self._busy[buffer] = []
            if self._stop.is_set():
                raise _Stopped
            block, stored = self._read(data, piece, first, last, self._buffers[buffer])
            busy = [self._hash_file(block)]
            if piece.name is not None and not data.copy:
                digest = self._tensor_hashes.setdefault(piece.name, hashlib.sha256())
                busy.append(self._tensor_hasher.submit(digest.update, stored))
            self._busy[buffer] = busy
            self._put(out, block, None)

    def _blocks(self, data: TensorData) -> Iterator[tuple[Piece, int, int, int]]:
        """(piece, buffer, first row, last row): as many rows at once as fit a buffer in either dtype."""
        turn = 0
        for piece in data.pieces:
            stored = data.dtype if piece.name is None else self._source.dtype(piece.name)
            row = data.row_elements * max(stored.itemsize, data.dtype.itemsize)
            step = max(1, self._options.block_bytes // max(1, row))
            for first in range(piece.start, piece.stop, step):
                yield piece, turn, first, min(first + step, piece.stop)
                turn = (turn + 1) % _BUFFERS

    def _read(
        self, data: TensorData, piece: Piece, first: int, last: int, buffer: Tensor
    ) -> tuple[memoryview, memoryview]:
        """A block as it is written and as it is stored."""
        elements = (last - first) * data.row_elements
        if piece.name is None:
            zeros = bytes_of(torch.zeros(elements, dtype=data.dtype))
            return zeros, zeros
        stored = self._source.dtype(piece.name)
        shape = (last - first, *self._source.shape(piece.name)[1:])
        assert math.prod(shape) == elements, (piece, shape, data)
        nbytes = elements * stored.itemsize
        # A row that is larger than a buffer has one of its own.
        memory = buffer if nbytes <= buffer.numel() else torch.empty(nbytes, dtype=torch.uint8)
        rows = self._source.read_rows(piece.name, first, last, memory[:nbytes].view(stored).view(shape))
        same = bytes_of(rows)
        return (same if stored == data.dtype else bytes_of(rows.to(data.dtype))), same

    def _hash_file(self, block: memoryview) -> Future[None]:
        return self._file_hasher.submit(self._file_hash.update, block)

    def _put(self, out: BinaryIO, block: memoryview, hashed: Future[None] | None) -> None:
        write_all(out, block)
        if hashed is not None:
            hashed.result()
        if self._options.progress is not None:
            self._options.progress(len(block))
        self._unsynced += len(block)
        if self._unsynced >= _SYNC_EVERY and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()  # a full disk may show here first
            self._sync = self._syncer.submit(os.fdatasync, out.fileno())
            self._unsynced = 0

    def _settle(self) -> None:
        for futures in self._busy:
            for future in futures:
                future.result()
