"""The boxes of a torch_dist checkpoint: torch.save archives of one tensor each, read by rows and planned by
bytes.

Such an archive is an uncompressed zip file, so a tensor's data lie in one piece in it. What stands before and
behind depends on dtype and shape only, which lets a whole checkpoint be laid out before a byte is written.
"""

import io
import math
import pickle
import threading
import zipfile
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from engine.errors import CheckpointError, ModelError, first_line
from engine.storage.files import FileRange, inside, read_into, shown
from engine.storage.metadata import DistChunk, DistTensor, check_pickle

_MAX_PICKLE = 100_000
"""Bytes of the pickle that describes one tensor; a few hundred in practice."""

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
"""What torch.save calls the memory of a tensor -> its dtype. Others are left to torch.load."""

_skipping_data = threading.Lock()


class Box:
    """One box of a tensor, in its file."""

    def __init__(self, directory: Path, tensor: DistTensor, chunk: DistChunk) -> None:
        self.path = inside(directory, chunk.file, error=CheckpointError)
        self._tensor, self._chunk = tensor, chunk
        if chunk.start + chunk.length > self.path.stat().st_size:
            raise CheckpointError(f"{self.path} is truncated inside {self._shown()}; use another checkpoint")

    def _shown(self) -> str:
        return shown(self._tensor.key)

    def read_rows(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, ...] with rows of the box, whose dimensions before those of a row count
        as one. `out` is contiguous.
        """
        columns = out.shape[1:]
        if self._data_start is None:  # not stored plainly
            out.copy_(self._load().reshape(-1, *columns)[start:stop])
            return
        row = math.prod(columns) * self._tensor.dtype.itemsize
        try:
            read_into(self.path, self._data_start + start * row, out)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read or changed since it was opened ({error})"
            ) from error

    def _load(self) -> Tensor:
        try:
            part = _load_plain(self.path, self._chunk.start, self._chunk.length)
        except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ValueError, ...
            raise self._damaged() from error
        if not isinstance(part, Tensor) or tuple(part.shape) != self._chunk.sizes:
            raise self._not_as_described()
        if part.dtype != self._tensor.dtype:
            raise self._not_as_described()
        return part

    @cached_property
    def _data_start(self) -> int | None:
        """Position in the file of the tensor's first byte; None where it is stored in another way than
        torch.save stores a contiguous tensor.
        """
        try:
            with self._open() as window, zipfile.ZipFile(window) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("torch.save does not compress; few bytes could become very many")
                names = {name.partition("/")[2]: name for name in archive.namelist()}
                if archive.getinfo(names["data.pkl"]).file_size > _MAX_PICKLE:
                    return None
                description = archive.read(names["data.pkl"])
                check_pickle(description)
                described = _Unpickler(io.BytesIO(description)).load()
                order = archive.read(names["byteorder"]) if "byteorder" in names else b"little"
                if not isinstance(described, _Described) or order != b"little":
                    return None
                info = archive.getinfo(names[f"data/{described.storage_key}"])
                header = _local_header(window, info)
        except (CheckpointError, zipfile.BadZipFile):
            return None  # classes of other tensors, or torch's older format; torch.load decides what can be
        except Exception as error:  # a damaged archive or pickle raises almost anything
            raise self._damaged() from error
        sizes = self._chunk.sizes
        if described.sizes != sizes or described.dtype != self._tensor.dtype:
            raise self._not_as_described()
        nbytes = math.prod(sizes) * self._tensor.dtype.itemsize
        if described.offset or info.file_size != nbytes or not _contiguous(described.strides, sizes):
            return None
        start = info.header_offset + header
        if start + nbytes > self._chunk.length:
            raise self._damaged()
        return self._chunk.start + start

    def _open(self) -> io.BufferedReader:
        return io.BufferedReader(FileRange(self.path, self._chunk.start, self._chunk.length))

    def _damaged(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged at {self._shown()}; use another checkpoint")

    def _not_as_described(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self._shown()} at {self._chunk.offsets} is not what .metadata says of it"
        )


def load_object(path: Path, start: int, length: int, *, what: str) -> Any:
    """What torch.load with `weights_only` makes of an archive inside a file. Raises CheckpointError."""
    try:
        return _load_plain(path, start, length)
    except Exception as error:  # damaged archives and refused pickles raise almost anything
        reason = first_line(error)
        raise CheckpointError(
            f"{path} is damaged at {shown(what)} ({shown(reason)}); use another checkpoint"
        ) from error


def _load_plain(path: Path, start: int, length: int) -> Any:
    with io.BufferedReader(FileRange(path, start, length)) as archive:
        return torch.load(archive, map_location="cpu", weights_only=True)


def _local_header(window: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Bytes of the header in front of a member: 30, its name, and a padding field."""
    window.seek(info.header_offset)
    fixed = window.read(30)
    if len(fixed) < 30 or fixed[:4] != b"PK\3\4":
        raise ValueError("no member where the directory says")
    return 30 + int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")


def _contiguous(strides: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in zip(reversed(strides), reversed(sizes), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _Described:
    """What the pickle of an archive says of its tensor."""

    def __init__(self, storage: Any, offset: int, sizes: Any, strides: Any, *_: Any) -> None:
        kind, self.dtype, self.storage_key = storage
        if kind != "storage" or type(offset) is not int:
            raise ValueError("not a tensor")
        self.offset, self.sizes, self.strides = offset, tuple(sizes), tuple(strides)


class _Unpickler(pickle.Unpickler):
    """Builds a `_Described` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Described
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(f"{shown(module)}.{shown(name)} is not part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        return kind, dtype, str(key)


@cache
def archive_around(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the data of a contiguous tensor, as torch.load wants it.

    The checksum of the data is left out, as torch.save itself can: torch does not look at it, and it stands
    in front of the data, which could then not be written in one go. Raises ModelError for a tensor that no
    memory of this machine could hold.
    """
    sink = _Sink()
    try:
        blank = torch.empty(shape, dtype=dtype)  # of which no page is touched
    except RuntimeError as error:
        raise ModelError(
            f"a weight of shape {list(shape)} takes {math.prod(shape) * dtype.itemsize / 1e9:.0f} GB, more "
            f"than this machine could ever hold; the model is not what it says"
        ) from error
    with _skipping_data, torch.serialization.skip_data():  # a switch of the whole process
        torch.save(blank, cast(Any, sink))
    assert sink.skipped == math.prod(shape) * dtype.itemsize, (dtype, shape, sink.skipped)
    return bytes(sink.before), bytes(sink.behind)


class _Sink(io.RawIOBase):
    """Keeps what is written before and behind the place where torch.save skips the data."""

    def __init__(self) -> None:
        self.before, self.behind, self.skipped, self._position = bytearray(), bytearray(), 0, 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert (whence, self.skipped) == (io.SEEK_CUR, 0), (offset, whence)
        self.skipped = offset
        self._position += offset
        return self._position

    def write(self, data: Any) -> int:
        (self.behind if self.skipped else self.before).extend(data)
        self._position += len(data)
        return len(data)
