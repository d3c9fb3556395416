"""Are two checkpoints the same model? Tensor by tensor, streaming, bytes first and numbers only where they
differ.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from converters.files import dtype_name
from converters.hf.reader import EMBEDDING, LM_HEAD, HfReader, check_weights, model_tensors
from converters.mapping import Weight, hf_tensors, weight_map
from converters.mcore.companions import COMPANIONS_DIR
from converters.mcore.reader import DistReader, is_dist_checkpoint, surplus_names
from engine.model.spec import ModelSpec, load_model_spec

Status = Literal["same", "missing", "surplus", "shape", "dtype", "values"]
_BLOCK = 1 << 22
"""Elements compared at once in double precision (32 MB)."""


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that is not the same. `missing`: in the model only; `surplus`: in the other only."""

    name: str
    status: Status
    expected: str
    """Shape and dtype in the model directory; empty for `surplus`."""
    found: str
    max_abs_diff: float | None
    """Largest absolute difference; nan where only one side is nan; None where shapes cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify`."""

    model: Path
    other: Path
    tensors: int
    """Tensors of the model that were looked for."""
    differences: tuple[TensorDifference, ...]
    config: tuple[str, ...]
    """Fields of the model description that differ, as "field: model's value, other's value"."""

    @property
    def same(self) -> bool:
        """Every tensor has the same name, shape, dtype and bytes, and the configurations describe the same
        model.
        """
        return not self.differences and not self.config

    def summary(self) -> str:
        """One line."""
        if self.same:
            return f"same model: {self.tensors} tensors are identical"
        return (
            f"NOT the same model: {len(self.differences)} tensors differ ({self.tensors} expected), "
            f"{len(self.config)} configuration fields differ"
        )

    def table(self) -> Table:
        """What differs, one row each, and the summary as caption."""
        table = Table(caption=self.summary())
        for column in ("tensor", "status", "model", "other", "max abs diff"):
            table.add_column(column, overflow="fold")
        for item in self.differences:
            number = "" if item.max_abs_diff is None else f"{item.max_abs_diff:.3e}"
            table.add_row(item.name, item.status, item.expected, item.found, number)
        for line in self.config:
            table.add_row("config.json", "values", line, "", "")
        return table

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "same": self.same,
            "model": str(self.model),
            "other": str(self.other),
            "tensors": self.tensors,
            "differences": [asdict(item) for item in self.differences],
            "config": list(self.config),
        }


def verify(model_dir: str | Path, other_dir: str | Path) -> VerifyReport:
    """Compare a Hugging Face directory with a Megatron checkpoint or another Hugging Face directory.

    Under tied embeddings `lm_head.weight` may be stored or not, as long as it is the embedding. Raises
    ModelError or CheckpointError for a directory that cannot be read; tensors that are missing or of another
    shape are differences.
    """
    model, other = Path(model_dir), Path(other_dir)
    spec = load_model_spec(model)
    weights = weight_map(spec)
    reader = HfReader(model)
    check_weights(reader, weights)
    compare = _compare_mcore if is_dist_checkpoint(other) else _compare_hf
    return VerifyReport(
        model=model,
        other=other,
        tensors=len(hf_tensors(weights)),
        differences=tuple(compare(reader, weights, other)),
        config=_config_differences(spec, other),
    )


def _config_differences(spec: ModelSpec, other: Path) -> tuple[str, ...]:
    """A checkpoint of another program has no configuration to compare; a Hugging Face directory must have
    one.
    """
    directory = other
    if is_dist_checkpoint(other):
        directory = other / COMPANIONS_DIR
        if not directory.is_dir():
            return ()
    mine, theirs = asdict(spec), asdict(load_model_spec(directory))
    return tuple(f"{key}: {mine[key]}, {theirs[key]}" for key in mine if mine[key] != theirs[key])


def _compare_hf(
    reader: HfReader, weights: Mapping[str, Weight], other_dir: Path
) -> Iterator[TensorDifference]:
    other = HfReader(other_dir)
    for name in hf_tensors(weights):
        if name not in other.tensors:
            yield _lacking(reader, name)
        else:
            yield from _difference(name, reader.read(name), other.read(name))
    for name in model_tensors(other):
        if name not in hf_tensors(weights) and name != LM_HEAD:
            info = other.tensors[name]
            yield _surplus(name, _describe(info.shape, info.dtype))
    yield from _lm_head(reader, weights, other)


def _lm_head(reader: HfReader, weights: Mapping[str, Weight], other: HfReader) -> Iterator[TensorDifference]:
    """Under tied embeddings the other side's LM head, if stored, must be the embedding too."""
    if LM_HEAD in other.tensors and LM_HEAD not in hf_tensors(weights):
        yield from _difference(LM_HEAD, reader.read(EMBEDDING), other.read(LM_HEAD))


def _compare_mcore(
    reader: HfReader, weights: Mapping[str, Weight], other_dir: Path
) -> Iterator[TensorDifference]:
    other = DistReader(other_dir)
    names = {name for name in weights if other.has(name)}
    for name, weight in weights.items():
        if name not in names:
            yield from (_lacking(reader, tensor.name) for tensor in weight.hf)
        elif not other.fits(name, weight):
            for part in weight.hf:
                expected = reader.tensors[part.name]
                yield TensorDifference(
                    name=part.name,
                    status="shape",
                    expected=_describe(expected.shape, expected.dtype),
                    found=f"{name} {_describe(other.shape(name), other.dtype(name))}",
                    max_abs_diff=None,
                )
        else:
            for hf_name, tensor in weight.to_hf(other.read(name, weight)).items():
                yield from _difference(hf_name, reader.read(hf_name), tensor)
    for name in surplus_names(other, weights):
        yield _surplus(name, _describe(other.shape(name), other.dtype(name)))


def _describe(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{list(shape)} {dtype_name(dtype)}"


def _lacking(reader: HfReader, name: str) -> TensorDifference:
    info = reader.tensors[name]
    expected = _describe(info.shape, info.dtype)
    return TensorDifference(name=name, status="missing", expected=expected, found="", max_abs_diff=None)


def _surplus(name: str, found: str) -> TensorDifference:
    return TensorDifference(name=name, status="surplus", expected="", found=found, max_abs_diff=None)


def _difference(name: str, expected: Tensor, found: Tensor) -> Iterator[TensorDifference]:
    """Nothing if the two are the same bytes; otherwise the first of shape, dtype and values that differs."""
    same_shape, same_dtype = expected.shape == found.shape, expected.dtype == found.dtype
    if same_shape and same_dtype and _same_bytes(expected, found):
        return
    yield TensorDifference(
        name=name,
        status="values" if same_shape and same_dtype else "dtype" if same_shape else "shape",
        expected=_describe(expected.shape, expected.dtype),
        found=_describe(found.shape, found.dtype),
        max_abs_diff=_max_abs_diff(expected, found) if same_shape else None,
    )


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bytes, so that nan equals itself and 0.0 differs from -0.0."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _max_abs_diff(a: Tensor, b: Tensor) -> float:
    """In double precision, block by block. Equal elements, nan beside nan among them, count as 0."""
    worst = 0.0
    for x, y in zip(a.reshape(-1).split(_BLOCK), b.reshape(-1).split(_BLOCK), strict=True):
        x, y = x.double(), y.double()
        alike = (x == y) | (x.isnan() & y.isnan())  # inf - inf would be nan
        block = (x - y).abs().masked_fill(alike, 0.0).max().item()
        if math.isnan(block):
            return block
        worst = max(worst, block)
    return worst
