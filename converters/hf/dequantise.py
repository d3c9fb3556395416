"""fp8 checkpoints, as Qwen publishes them, read as if they had been stored in bf16.

A quantised linear is stored as `X.weight` in fp8 (E4M3) and one scale for each block of it. A value is the
stored one times the scale of its block; the scale's usual name, `X.weight_scale_inv`, is that of the inverse
of what the weights were multiplied by when they were quantised.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.hf.reader import FP8, HfReader, HfWeights
from converters.source import new_or_given, row_blocks
from engine.errors import ModelError
from engine.model.spec import read_hf_config, refuse_quantised
from engine.storage.files import dtype_name, shown

_SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""What the scale of `X.weight` may be called: Qwen's and transformers' word, and vLLM's."""
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATION_SCALES = ("activation_scale", "input_scale")
"""Beside `X.weight` where activations are quantised statically; weights in bf16 have no use for them."""
_STEP_ELEMENTS = 250_000
"""Elements that are in fp32 at once: few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Fp8Scheme:
    """What the `quantization_config` of an fp8 checkpoint says of its weights."""

    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: a whole weight shares one, or each of its rows does."""


def read_fp8_scheme(model_dir: str | Path) -> Fp8Scheme:
    """Read `config.json`. Raises ModelError for one without a quantization_config and for any method or
    format but fp8 E4M3.
    """
    config, where = read_hf_config(model_dir), str(Path(model_dir) / "config.json")
    settings = config.get("quantization_config")
    if not settings:
        raise ModelError(
            f"{where}: no quantization_config says how the weights are quantised; leave out --dequantise, "
            f"or use the config.json that was published with fp8 weights"
        )
    refuse_quantised(config, where, fp8=True)
    if settings.get("fmt") not in (None, "e4m3"):
        raise ModelError(
            f"{where}: quantised (fp8, fmt {shown(settings['fmt'])}) source; only e4m3 is dequantised, "
            f"convert from the unquantised checkpoint"
        )
    block = settings.get("weight_block_size")
    if block is None:
        return Fp8Scheme(block=None)
    if not isinstance(block, list) or [type(size) for size in block] != [int, int] or min(block) < 1:
        raise ModelError(
            f"{where}: weight_block_size must be null or two positive whole numbers, not {shown(block)}; "
            f"download it again"
        )
    return Fp8Scheme(block=(block[0], block[1]))


def dequantised_config(model_dir: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of an fp8 checkpoint as it is once its weights are of `dtype`."""
    config = read_hf_config(model_dir)
    config.pop("quantization_config", None)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, dtype_name(dtype))


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """The scales of a weight: a grid with one for each block of `rows` by `columns` elements."""

    name: str
    rows: int
    columns: int


class DequantisedSource(HfWeights):
    """The weights of an fp8 checkpoint: those that are stored in fp8 with their scales applied, in fp32, and
    rounded once, to `dtype`; the others as they are stored. Scales are not among the tensors.

    What a conversion hashes is what it reads here. The digest of the source in a manifest is thus that of
    the dequantised weights, the same as for a source in which they are stored so.

    Raises ModelError for a scale that is missing, misshapen, not finite, or without a weight.
    """

    def __init__(self, reader: HfReader, scheme: Fp8Scheme, *, dtype: torch.dtype = torch.bfloat16) -> None:
        self.directory, self._reader, self._dtype = reader.directory, reader, dtype
        quantised = [name for name, info in reader.tensors.items() if info.stored_dtype == FP8]
        self._scales = {name: _scale_of(reader, name, scheme) for name in quantised}
        _check_scales(reader, self._scales)
        hidden = {scale.name for scale in self._scales.values()}
        hidden |= {
            f"{name.removesuffix('weight')}{kind}" for name in quantised for kind in _ACTIVATION_SCALES
        }
        self._names = [name for name in reader.names() if name not in hidden]

    def names(self) -> list[str]:
        return list(self._names)

    def files(self) -> list[Path]:
        # The size of a block is in config.json: with another one an interrupted conversion must start anew.
        return [self.directory / "config.json", *self._reader.files()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._scales else self._reader.dtype(name)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop), from their bytes and those of the scales that they need."""
        if name not in self._scales:
            return self._reader.read_rows(name, start, stop, out)
        columns, scale = self.shape(name)[1], self._scales[name]
        rows = new_or_given((stop - start, columns), self._dtype, out)
        stored = self._reader.read_fp8_rows(name, start, stop)
        factors = self._factors(scale, start, stop)
        step = max(1, _STEP_ELEMENTS // max(1, columns))
        for first in range(0, stop - start, step):
            values = stored[first : first + step].float()
            part = factors[first : first + step, :, None].expand(-1, -1, min(scale.columns, columns))
            values *= part.flatten(1)[:, :columns]
            rows[first : first + step] = values
        return rows

    def _factors(self, scale: _Scale, start: int, stop: int) -> Tensor:
        """The scales of rows [start, stop), one for each block of columns: [stop - start, blocks], fp32."""
        first, last = start // scale.rows, -(-stop // scale.rows)
        if len(self._reader.shape(scale.name)) == 2:
            grid = self._reader.read_rows(scale.name, first, last)
        else:  # one number
            grid = self._reader.read(scale.name).reshape(1, 1)
        return grid.float()[torch.arange(start, stop) // scale.rows - first]


def open_dequantised(model_dir: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> DequantisedSource:
    """The weights of an fp8 directory in `dtype`. Raises ModelError for what is not to be dequantised."""
    scheme = read_fp8_scheme(model_dir)
    return DequantisedSource(HfReader(model_dir), scheme, dtype=dtype)


def _scale_of(reader: HfReader, name: str, scheme: Fp8Scheme) -> _Scale:
    """The scales of an fp8 weight, which must be there once, in the shape that the scheme asks for."""
    info = reader.tensors[name]
    found = [name + suffix for suffix in _SCALE_SUFFIXES if name + suffix in reader.tensors]
    if not found:
        raise ModelError(
            f"{info.file}: weight {shown(name)} is in fp8, but its scale {shown(name + _SCALE_SUFFIXES[0])} "
            f"is missing; download it again"
        )
    if len(found) > 1:
        raise ModelError(f"{info.file}: weight {shown(name)} has two scales, {' and '.join(found)}; keep one")
    if len(info.shape) != 2:
        raise ModelError(
            f"{info.file}: weight {shown(name)} is in fp8 and has shape {list(info.shape)}; only matrices "
            f"are dequantised, convert from the bf16 checkpoint"
        )
    scale, (rows, columns) = reader.tensors[found[0]], info.shape
    if scheme.block is None:
        if scale.shape in ((), (1,), (1, 1)):
            return _Scale(name=scale.name, rows=rows, columns=columns)
        if scale.shape == (rows, 1):
            return _Scale(name=scale.name, rows=1, columns=columns)
        wanted, reason = f"[] or {[rows, 1]}", "config.json names no weight_block_size"
    else:
        height, width = scheme.block
        grid = (-(-rows // height), -(-columns // width))
        if scale.shape == grid:
            return _Scale(name=scale.name, rows=height, columns=width)
        wanted, reason = str(list(grid)), f"weight_block_size is {[height, width]}"
    raise ModelError(
        f"{scale.file}: scale {shown(scale.name)} has shape {list(scale.shape)}, not {wanted} for a weight "
        f"of shape {[rows, columns]} where {reason}; download weights and config.json again"
    )


def _check_scales(reader: HfReader, scales: dict[str, _Scale]) -> None:
    """Raise ModelError for a scale that has no fp8 weight, or whose values are no factors.

    All of them are read: they are a small part of a model, and a damaged one should not show after an hour.
    """
    for name, info in reader.tensors.items():
        for suffix in _SCALE_SUFFIXES:
            weight = name.removesuffix(suffix)
            if name.endswith(f".weight{suffix}") and weight not in scales:
                stored = reader.tensors.get(weight)
                state = "missing" if stored is None else f"in {shown(stored.stored_dtype)}, not in fp8"
                raise ModelError(
                    f"{info.file}: scale {shown(name)} is there, but its weight {shown(weight)} is {state}; "
                    f"download it again"
                )
    for scale in scales.values():
        info = reader.tensors[scale.name]
        if info.dtype not in _SCALE_DTYPES:
            kinds = ", ".join(map(dtype_name, _SCALE_DTYPES))
            raise ModelError(
                f"{info.file}: scale {shown(scale.name)} has dtype {info.stored_dtype}, not one of {kinds}; "
                f"convert from the bf16 checkpoint"
            )
        if len(info.shape) < 2:
            finite = bool(reader.read(scale.name).isfinite().all())
        else:
            blocks = (reader.read_rows(scale.name, *rows) for rows in row_blocks(reader, scale.name))
            finite = all(bool(block.isfinite().all()) for block in blocks)
        if not finite:
            raise ModelError(
                f"{info.file}: scale {shown(scale.name)} holds nan or inf; the file is damaged, download it "
                f"again"
            )
