"""Are two checkpoints the same model? Tensor by tensor in blocks of rows, several tensors at a time; bytes
first, and numbers only where those differ.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from converters.hf.reader import EMBEDDING, LM_HEAD, HfReader, check_weights, model_tensors
from converters.mapping import Weight, hf_tensors, weight_map
from converters.mcore.reader import DistReader, McoreSource, surplus_names
from converters.model import config_dir_of
from engine.model.spec import ModelSpec, load_model_spec
from engine.storage.files import bytes_of, dtype_name, shown
from engine.storage.reader import is_dist_checkpoint

Status = Literal["same", "missing", "surplus", "shape", "dtype", "values"]

_BLOCK = 4_000_000
"""Bytes of a tensor that are read at once, on either side; one row at least."""
_NUMBERS = 1 << 20
"""Elements compared at once in double precision (8 MB)."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as one side stores it."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str | None
    """Of the bytes in row-major order; None for a scalar, and for a Megatron tensor of another shape than the
    model's, which cannot be taken apart.
    """
    nan: int
    """Elements that are not a number."""
    inf: int
    """Elements that are infinite, of either sign."""

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What was found of a tensor. `missing`: in the model only; `surplus`: in the other only."""

    name: str
    status: Status
    model: StoredTensor | None
    other: StoredTensor | None
    max_abs_diff: float | None
    """Largest absolute difference; nan where only one side is nan; None where there is no common shape."""
    other_name: str = ""
    """Name in the other side, where it is not `name`."""

    @property
    def expected(self) -> str:
        """Shape and dtype in the model directory; empty for `surplus`."""
        return str(self.model or "")

    @property
    def found(self) -> str:
        """Shape and dtype in the other; empty for `missing`."""
        return f"{shown(self.other_name)} {self.other or ''}".strip()

    def not_finite(self) -> str | None:
        """A line that says how many elements are NaN or infinite, if any are."""
        sides = [side for side in (self.model, self.other) if side is not None]
        counts = [f"{side.nan} NaN and {side.inf} Inf" for side in sides]
        if not any(side.nan or side.inf for side in sides):
            return None
        if len(counts) == 2 and counts[0] != counts[1]:
            return f"{shown(self.name)} holds {counts[0]}; in the other {counts[1]}"
        return f"{shown(self.name)} holds {counts[0]}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no numbers that are not finite: they are the strings "nan" and "inf"."""
        return {
            "name": self.name,
            "status": self.status,
            **_fields(self.model, ""),
            **_fields(self.other, "other_"),
            "max_abs_diff": json_number(self.max_abs_diff),
        }


def _fields(side: StoredTensor | None, prefix: str) -> dict[str, Any]:
    names = ("shape", "dtype", "sha256", "nan", "inf")
    return {f"{prefix}{name}": getattr(side, name, None) for name in names}


def json_number(value: float | None) -> float | str | None:
    """A number as JSON can hold it: "nan" and "inf" are strings."""
    return value if value is None or math.isfinite(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify`."""

    model: Path
    other: Path
    tensors: tuple[TensorReport, ...]
    """Every tensor of the model, and what the other has besides."""
    config: tuple[str, ...]
    """Fields of the model description that differ, as "field: model's value, other's value"."""

    @property
    def differences(self) -> tuple[TensorReport, ...]:
        """The tensors that are not the same."""
        return tuple(tensor for tensor in self.tensors if tensor.status != "same")

    @property
    def same(self) -> bool:
        """Every tensor has the same name, shape, dtype and bytes, and the configurations describe the same
        model. NaN and Inf are bytes like any others.
        """
        return not self.differences and not self.config

    def summary(self) -> str:
        """One line."""
        expected = sum(tensor.status != "surplus" for tensor in self.tensors)
        if self.same:
            return f"same model: {expected} tensors are identical"
        return (
            f"NOT the same model: {len(self.differences)} tensors differ ({expected} expected), "
            f"{len(self.config)} configuration fields differ"
        )

    def table(self) -> Table:
        """What differs, one row each, and the summary as caption."""
        table = Table(caption=self.summary())
        for column in ("tensor", "status", "model", "other", "max abs diff"):
            table.add_column(column, overflow="fold")
        for item in self.differences:
            number = "" if item.max_abs_diff is None else f"{item.max_abs_diff:.3e}"
            cells = (shown(item.name), item.status, item.expected, item.found, number)
            table.add_row(
                *map(Text, cells)
            )  # names are from files, and brackets in a plain string are markup
        for line in self.config:
            table.add_row("config.json", "values", Text(line), "", "")
        return table

    def not_finite(self) -> list[str]:
        """A line for each tensor with NaN or infinite elements, whichever side holds them."""
        return [line for tensor in self.tensors if (line := tensor.not_finite()) is not None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "same": self.same,
            "model": str(self.model),
            "other": str(self.other),
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "differences": [tensor.as_dict() for tensor in self.differences],
            "config": list(self.config),
        }


def verify(model_dir: str | Path, other_dir: str | Path, *, workers: int = 1) -> VerifyReport:
    """Compare a Hugging Face directory with a Megatron checkpoint or another Hugging Face directory.

    `workers` tensors are compared at a time, each in blocks of a few megabytes, however large it is.

    Under tied embeddings `lm_head.weight` may be stored or not, as long as it is the embedding. Raises
    ModelError or CheckpointError for a directory that cannot be read; tensors that are missing or of another
    shape are differences.
    """
    model, other = Path(model_dir), Path(other_dir)
    spec = load_model_spec(model)
    weights, reader = weight_map(spec), HfReader(model)
    check_weights(reader, weights)
    config = config_differences(spec, other)
    compare = _against_mcore if is_dist_checkpoint(other) else _against_hf
    jobs = list(compare(reader, weights, other))
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        tensors = tuple(pool.map(lambda job: job(), jobs))
    return VerifyReport(model=model, other=other, tensors=tensors, config=config)


def config_differences(spec: ModelSpec, other: Path) -> tuple[str, ...]:
    """What `VerifyReport.config` has, without a look at weights. A checkpoint of another program has no
    configuration to compare; a Hugging Face directory must have one.
    """
    directory = config_dir_of(other)
    if is_dist_checkpoint(other) and not directory.is_dir():
        return ()
    mine, theirs = _description(spec), _description(load_model_spec(directory))
    pairs = {key: (mine.get(key), theirs.get(key)) for key in mine | theirs}
    return tuple(f"{key}: {a}, {b}" for key, (a, b) in pairs.items() if a != b)


def _description(spec: ModelSpec) -> dict[str, Any]:
    """Every field by its name, those of a mixture of experts as `moe.<name>`."""
    fields = asdict(spec)
    moe = fields.pop("moe")
    return fields | {f"moe.{name}": value for name, value in (moe or {}).items()}


_Job = Callable[[], TensorReport]


def _against_hf(reader: HfReader, weights: Mapping[str, Weight], other_dir: Path) -> Iterator[_Job]:
    other, expected = HfReader(other_dir), hf_tensors(weights)
    for name in expected:
        if name in other.tensors:
            yield partial(_compare, name, reader, other)
        else:
            yield partial(_lacking, name, reader)
    for name in model_tensors(other):
        if name not in expected and name != LM_HEAD:
            yield partial(_surplus, name, other)
    if LM_HEAD in other.tensors and LM_HEAD not in expected:
        # Under tied embeddings the other side's LM head must be the embedding too.
        yield partial(_compare, LM_HEAD, reader, other, model_name=EMBEDDING)


def _against_mcore(reader: HfReader, weights: Mapping[str, Weight], other_dir: Path) -> Iterator[_Job]:
    other = DistReader(other_dir)
    source = McoreSource(other, weights)
    for name, weight in weights.items():
        for tensor in weight.hf:
            if not other.has(name):
                yield partial(_lacking, tensor.name, reader)
            elif other.fits(name, weight):
                yield partial(_compare, tensor.name, reader, source)
            else:
                yield partial(_misshapen, tensor.name, reader, name, other)
    for name in surplus_names(other, weights):
        yield partial(_surplus, name, other)


def _lacking(name: str, reader: HfReader) -> TensorReport:
    return TensorReport(
        name=name, status="missing", model=stored_tensor(reader, name), other=None, max_abs_diff=None
    )


def _surplus(name: str, other: "Readable") -> TensorReport:
    return TensorReport(
        name=name, status="surplus", model=None, other=stored_tensor(other, name), max_abs_diff=None
    )


def _misshapen(name: str, reader: HfReader, other_name: str, other: DistReader) -> TensorReport:
    found = _Content().stored(other.shape(other_name), other.dtype(other_name), unread=True)
    return TensorReport(
        name=name,
        status="shape",
        model=stored_tensor(reader, name),
        other=found,
        max_abs_diff=None,
        other_name=other_name,
    )


class Readable(Protocol):
    """What `Source` and `DistReader` have in common, each under its own names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read_rows` gives."""

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, contiguous; into `out` where it is given."""


class _Content:
    """Digest and counts of what was read of a tensor so far."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._nan = self._inf = 0

    def add(self, block: Tensor) -> None:
        self._sha256.update(bytes_of(block))
        if not block.is_floating_point() or block.numel() == 0:
            return
        # Either is nan if any element is; counting at once would cost as much as the digest.
        low, high = torch.aminmax(block)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            self._nan += int(block.isnan().sum())
            self._inf += int(block.isinf().sum())

    def fork(self) -> "_Content":
        other = copy.copy(self)
        other._sha256 = self._sha256.copy()
        return other

    def stored(self, shape: tuple[int, ...], dtype: torch.dtype, *, unread: bool = False) -> StoredTensor:
        digest = None if unread else self._sha256.hexdigest()
        return StoredTensor(
            shape=tuple(shape), dtype=dtype_name(dtype), sha256=digest, nan=self._nan, inf=self._inf
        )


class _Rows:
    """The rows of one tensor, a block at a time into the same memory."""

    def __init__(self, source: Readable, name: str) -> None:
        self._source, self._name = source, name
        self.shape, self.dtype = tuple(source.shape(name)), source.dtype(name)
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, first: int, last: int) -> Tensor:
        count = (last - first) * self.row_bytes
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.uint8)
        out = self._memory[:count].view(self.dtype).view(last - first, *self.shape[1:])
        return self._source.read_rows(self._name, first, last, out)


def _blocks(*tensors: _Rows) -> Iterator[tuple[int, int]]:
    """Ranges of rows, the same for all tensors, of at most `_BLOCK` bytes of any of them."""
    rows = tensors[0].shape[0]
    step = max(1, _BLOCK // max(1, *(tensor.row_bytes for tensor in tensors)))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def stored_tensor(source: Readable, name: str) -> StoredTensor:
    """Shape, dtype, digest and counts of a tensor, read in blocks. Raises what the source raises."""
    tensor, content = _Rows(source, name), _Content()
    if not tensor.shape:
        return content.stored(tensor.shape, tensor.dtype, unread=True)
    for first, last in _blocks(tensor):
        content.add(tensor.read(first, last))
    return content.stored(tensor.shape, tensor.dtype)


def _compare(name: str, model: Readable, other: Readable, *, model_name: str = "") -> TensorReport:
    """The first of shape, dtype and values in which the two tensors differ; bytes that are the same on both
    sides are hashed once.
    """
    mine, theirs = _Rows(model, model_name or name), _Rows(other, name)
    if mine.shape != theirs.shape:
        return TensorReport(
            name=name,
            status="shape",
            model=stored_tensor(model, model_name or name),
            other=stored_tensor(other, name),
            max_abs_diff=None,
        )
    same_dtype, worst = mine.dtype == theirs.dtype, 0.0
    content, fork = _Content(), None if same_dtype else _Content()
    for first, last in _blocks(mine, theirs):
        a, b = mine.read(first, last), theirs.read(first, last)
        if fork is None and not same_bytes(a, b):
            fork = content.fork()
        content.add(a)
        if fork is not None:
            fork.add(b)
            worst = larger(worst, max_abs_diff(a, b))
    return TensorReport(
        name=name,
        status="dtype" if not same_dtype else "same" if fork is None else "values",
        model=content.stored(mine.shape, mine.dtype),
        other=(fork or content).stored(theirs.shape, theirs.dtype),
        max_abs_diff=worst,
    )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bytes, so that nan equals itself and 0.0 differs from -0.0. Both contiguous, of one dtype and size."""
    a, b = a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    whole = a.numel() // 8 * 8
    # Eight bytes at once: torch compares element by element.
    words = a[:whole].view(torch.int64), b[:whole].view(torch.int64)
    return torch.equal(*words) and torch.equal(a[whole:], b[whole:])


def max_abs_diff(a: Tensor, b: Tensor) -> float:
    """In double precision, block by block; nan if any difference is. Equal elements, nan beside nan among
    them, count as 0.
    """
    worst = 0.0
    for x, y in zip(a.reshape(-1).split(_NUMBERS), b.reshape(-1).split(_NUMBERS), strict=True):
        wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
        x, y = x.to(wide), y.to(wide)
        alike = (x == y) | (x.isnan() & y.isnan())  # inf - inf would be nan
        if x.numel():
            worst = larger(worst, (x - y).abs().masked_fill(alike, 0.0).max().item())
    return worst


def larger(a: float, b: float) -> float:
    """The larger of two; nan if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
