"""Laying out Hugging Face weight files, byte for byte as the safetensors library would, or as the source did.

The files of a source are kept as their headers (`hf_layout/`): a checkpoint that came from them, with the
same dtypes, becomes those very files again, whoever wrote them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.hf.reader import (
    DTYPES,
    INDEX_FILE,
    MAX_JSON_BYTES,
    SINGLE_FILE,
    HfReader,
    header_bytes,
    parse_header,
    read_index,
)
from engine.errors import CheckpointError, ConfigError, ModelError
from engine.storage.durable import fsync
from engine.storage.files import inside

LAYOUT_DIR = "hf_layout"
DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of tensor data in a file; transformers' default."""

_HEADER_SUFFIX = ".header"
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


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A safetensors file: its header, and its tensors in the order of their data."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]


@dataclass(frozen=True, kw_only=True)
class HfLayout:
    """The weight files of a directory, and the index if there are several."""

    files: tuple[WeightFile, ...]
    index: bytes | None


def plan_layout(
    tensors: Sequence[PlannedTensor],
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    single_file: str = SINGLE_FILE,
) -> HfLayout:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and an index where one file would be too
    big.

    Tensors are distributed over files in the order given, filling each up to `max_shard_size` bytes of data
    (a larger tensor gets a file of its own). Raises ConfigError for a size that is not positive.
    """
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be a positive number of bytes, not {max_shard_size}")
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor is planned twice"
    groups = _split(tensors, max_shard_size)
    files = []
    for number, group in enumerate(groups, start=1):
        name = single_file if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        files.append(_weight_file(name, group))
    if len(files) == 1:
        return HfLayout(files=tuple(files), index=None)
    places = {tensor.name: file.name for file in files for tensor in file.tensors}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {name: places[name] for name in sorted(places)},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    return HfLayout(files=tuple(files), index=text.encode())


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


def _weight_file(name: str, group: Sequence[PlannedTensor]) -> WeightFile:
    """Header and order as the safetensors library lays them out: widest dtype first, then by name."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(group, key=lambda tensor: (-_RANKS[tensor.dtype], tensor.name.encode()))
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return WeightFile(name=name, header=len(text).to_bytes(8, "little") + text, tensors=tuple(ordered))


def source_layout(reader: HfReader) -> HfLayout:
    """The layout of the files of a directory. OSError comes from the disk."""
    files = [_weight_file_of(path.name, path, header_bytes(path)) for path in reader.files()]
    index = None
    if [file.name for file in files] != [SINGLE_FILE]:  # a single file of another name has an index, too
        index = inside(reader.directory, INDEX_FILE, error=ModelError).read_bytes()
    return HfLayout(files=tuple(files), index=index)


def keep_layout(layout: HfLayout, target_dir: Path) -> None:
    """Store a layout in `target_dir`/hf_layout. OSError comes from the disk."""
    directory = target_dir / LAYOUT_DIR
    directory.mkdir(exist_ok=True)
    kept = {f"{file.name}{_HEADER_SUFFIX}": file.header for file in layout.files}
    if layout.index is not None:
        kept[INDEX_FILE] = layout.index
    for name, content in kept.items():
        (directory / name).write_bytes(content)
        fsync(directory / name)
    fsync(directory)


def kept_layout(checkpoint_dir: Path) -> HfLayout | None:
    """The layout of the source's files, if the checkpoint has it. Raises CheckpointError if it is damaged:
    it may have been copied from anywhere, so it is read as strictly as the files of a model.
    """
    directory = checkpoint_dir / LAYOUT_DIR
    if not directory.is_dir():
        return None
    try:
        files = [_kept_file(directory, path.name) for path in sorted(directory.glob(f"*{_HEADER_SUFFIX}"))]
        index = None
        if (directory / INDEX_FILE).exists():
            path = inside(directory, INDEX_FILE, error=ModelError)
            read_index(path)
            index = path.read_bytes()
    except (ModelError, OSError) as error:
        raise CheckpointError(f"{error}; or remove {directory}, then files are laid out anew") from error
    return HfLayout(files=tuple(files), index=index)


def _kept_file(directory: Path, name: str) -> WeightFile:
    path = inside(directory, name, error=ModelError)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is no header")
    return _weight_file_of(name.removesuffix(_HEADER_SUFFIX), path, path.read_bytes())


def _weight_file_of(name: str, path: Path, header: bytes) -> WeightFile:
    infos = parse_header(path, header, size=None).values()
    ordered = sorted(infos, key=lambda info: (info.start, info.stop))
    tensors = tuple(PlannedTensor(name=info.name, dtype=info.dtype, shape=info.shape) for info in ordered)
    return WeightFile(name=name, header=header, tensors=tensors)


def _is_shard_name(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and "/" not in name


def fits(layout: HfLayout, plan: Mapping[str, PlannedTensor]) -> bool:
    """Whether the layout's files hold exactly these tensors, in name, dtype and shape, and whoever reads a
    directory of them, with the index, finds them all.
    """
    held = [tensor for file in layout.files for tensor in file.tensors]
    places = {tensor.name: file.name for file in layout.files for tensor in file.tensors}
    if not len(held) == len(places) == len(plan) or any(plan.get(tensor.name) != tensor for tensor in held):
        return False
    names = {file.name for file in layout.files}
    if layout.index is None:
        return names == {SINGLE_FILE}
    # Beside a file of that name nobody looks at the index.
    if SINGLE_FILE in names or not all(map(_is_shard_name, names)):
        return False
    try:
        return bool(json.loads(layout.index)["weight_map"] == places)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
