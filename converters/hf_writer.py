"""Writing Hugging Face weight files tensor by tensor, byte for byte as the safetensors library would."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from converters.files import fsync, write_json
from converters.hf_files import DTYPES, INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of tensor data in a file; transformers' default."""

_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written; a file's header comes before its data, so all are known beforehand."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(kw_only=True)
class _Shard:
    path: Path
    header: bytes
    offsets: Mapping[str, int]
    """Tensor name -> position of its first byte in the file."""
    waiting: set[str]
    file: BufferedWriter | None = None


class HfWriter:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and an index where one file would be
    too big.

    `tensors` are distributed over files in the order given, filling each up to `max_shard_size` bytes of data
    (a larger tensor gets a file of its own). `add` may come in any order and writes straight to the place in
    the file: no tensor is held. Use as a context manager; leaving it makes the files durable. OSError comes
    from the disk.
    """

    def __init__(
        self,
        output_dir: str | Path,
        tensors: Sequence[PlannedTensor],
        *,
        max_shard_size: int = DEFAULT_SHARD_SIZE,
        metadata: Mapping[str, str] | None = None,
        single_file: str = SINGLE_FILE,
    ) -> None:
        self._directory = Path(output_dir)
        self._plan = {tensor.name: tensor for tensor in tensors}
        assert len(self._plan) == len(tensors), "a tensor is planned twice"
        groups = _split(tensors, max_shard_size)
        self._shards: dict[str, _Shard] = {}
        for number, group in enumerate(groups, start=1):
            name = single_file if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            shard = _layout(self._directory / name, group, {"format": "pt"} if metadata is None else metadata)
            self._shards |= dict.fromkeys(shard.waiting, shard)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a planned tensor, of exactly the planned dtype and shape."""
        planned, shard = self._plan[name], self._shards[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (planned.dtype, tuple(planned.shape)), (
            name,
            tensor.shape,
        )
        if shard.file is None:
            shard.file = open(shard.path, "wb")  # noqa: SIM115  stays open until its last tensor
            shard.file.write(shard.header)
        shard.waiting.remove(name)
        shard.file.seek(shard.offsets[name])
        shard.file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if not shard.waiting:
            shard.file.close()
            fsync(shard.path)

    def close(self) -> None:
        """Write the index if there are several files. Every planned tensor must have been added."""
        missing = [name for name, shard in self._shards.items() if name in shard.waiting]
        assert not missing, f"{len(missing)} planned tensors were not written, first {missing[0]}"
        files = {name: shard.path.name for name, shard in self._shards.items()}
        if len(set(files.values())) > 1:
            total = sum(tensor.nbytes for tensor in self._plan.values())
            weight_map = {name: files[name] for name in sorted(files)}
            write_json(
                self._directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

    def __enter__(self) -> "HfWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the directory is about to be thrown away
            for shard in self._shards.values():
                if shard.file is not None:
                    with suppress(OSError):
                        shard.file.close()


def _split(tensors: Iterable[PlannedTensor], max_shard_size: int) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = []
    used = 0
    for tensor in tensors:
        if not groups or used + tensor.nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    return groups


def _layout(path: Path, group: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> _Shard:
    """Header and offsets as the safetensors library lays them out: widest dtype first, then by name."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for tensor in sorted(group, key=lambda tensor: (-_RANKS[tensor.dtype], tensor.name.encode())):
        starts[tensor.name], end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return _Shard(
        path=path,
        header=header,
        offsets={name: len(header) + start for name, start in starts.items()},
        waiting=set(starts),
    )
