"""Hugging Face weight files: a strict reader, and a check against the mapping table.

Only safetensors are read, and nothing is trusted: the header is parsed and validated here, before any byte of
a tensor is looked at.
"""

import json
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.mapping import Weight, hf_tensors
from converters.source import Source, new_or_given, row_blocks
from engine.errors import ModelError
from engine.model.spec import FP8_REFUSAL
from engine.storage.files import and_more, inside, read_into, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
MAX_JSON_BYTES = 100_000_000
"""Largest header or index that is read; the safetensors library has the same limit."""

# In the order in which safetensors' own writer sorts, lowest first.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP8 = "F8_E4M3"
"""The dtype that quantised weights are read in by whoever has their scales, and that others refuse."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ITEM_BYTES = {code: dtype.itemsize for code, dtype in DTYPES.items()} | {FP8: 1}
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_MAX_DIMENSIONS = 64  # torch's
_FUSED = re.compile(r".*\.mlp\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor of a safetensors file lies. Offsets are bytes from the start of the file."""

    name: str
    stored_dtype: str
    """The file's own word for the dtype, such as BF16."""
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype. Raises ModelError for one that Braid does not read (fp8 and other quantised
        formats).
        """
        if self.stored_dtype not in DTYPES:
            other = "quantised source; convert from the unquantised checkpoint"
            raise ModelError(
                f"{self.file}: {shown(self.name)} has dtype {shown(self.stored_dtype)}, a "
                f"{FP8_REFUSAL if self.stored_dtype == FP8 else other}"
            )
        return DTYPES[self.stored_dtype]


class HfWeights(Source):
    """The weights of a Hugging Face directory, as they are stored or as something else sees them."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors."""


class HfReader(HfWeights):
    """The tensors of a Hugging Face checkpoint directory, one file or many shards.

    Like transformers, `model.safetensors` wins where an index lies beside it. Raises ModelError naming file
    and tensor for anything missing, truncated, inconsistent, outside the directory, or in another format than
    safetensors.
    """

    def __init__(self, model_dir: str | Path, *, single_file: str = SINGLE_FILE) -> None:
        self.directory = Path(model_dir)
        if not self.directory.is_dir():
            raise ModelError(f"model directory {model_dir} does not exist; pass a Hugging Face checkpoint")
        self.tensors: dict[str, TensorInfo] = {}
        if _present(self.directory / single_file):
            self.tensors = read_header(inside(self.directory, single_file, error=ModelError))
        elif single_file != SINGLE_FILE:
            raise ModelError(_no_weights(self.directory, f"no {single_file}"))
        elif _present(self.directory / INDEX_FILE):
            self._read_shards()
        else:
            raise ModelError(_no_weights(self.directory, f"neither {SINGLE_FILE} nor {INDEX_FILE}"))

    def _read_shards(self) -> None:
        weight_map = read_index(inside(self.directory, INDEX_FILE, error=ModelError))
        for file in dict.fromkeys(weight_map.values()):
            for name, info in read_header(inside(self.directory, file, error=ModelError)).items():
                if name in self.tensors:
                    raise ModelError(
                        f"{info.file}: tensor {shown(name)} is in {self.tensors[name].file.name} too; "
                        f"keep one of them"
                    )
                if name not in weight_map:
                    raise ModelError(
                        f"{info.file}: tensor {shown(name)} is not listed in {INDEX_FILE}; download it again"
                    )
                self.tensors[name] = info
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ModelError(
                    f"{self.directory / file}: tensor {shown(name)} is listed in {INDEX_FILE} but is not in "
                    f"the file; download it again"
                )

    def names(self) -> list[str]:
        return list(self.tensors)

    def files(self) -> list[Path]:
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelError if it is missing."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype. Raises ModelError if the tensor is missing or of a dtype that Braid does not read."""
        return self._info(name).dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its stored dtype. Raises ModelError (unreadable dtype or file)."""
        info = self._info(name)
        return self._fill(info, info.start, torch.empty(info.shape, dtype=info.dtype))

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop); only their bytes are read."""
        info = self._info(name)
        assert 0 <= start <= stop <= info.shape[0], f"rows [{start}, {stop}) of {name} {info.shape}"
        rows = new_or_given((stop - start, *info.shape[1:]), info.dtype, out)
        return self._fill(info, info.start + start * self.row_bytes(name), rows)

    def read_fp8_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor that is stored in fp8, float8_e4m3fn; without its scales they mean
        nothing.
        """
        info = self._info(name)
        assert info.stored_dtype == FP8, info
        assert 0 <= start <= stop <= info.shape[0], f"rows [{start}, {stop}) of {name} {info.shape}"
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=torch.float8_e4m3fn)
        return self._fill(info, info.start + start * math.prod(info.shape[1:]), rows)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ModelError(f"{self.directory}: weight {shown(name)} is missing")
        return self.tensors[name]

    @staticmethod
    def _fill(info: TensorInfo, start: int, out: Tensor) -> Tensor:
        try:
            read_into(info.file, start, out)
        except OSError as error:
            raise ModelError(
                f"{info.file} cannot be read or changed since it was opened ({error})"
            ) from error
        return out


def _present(path: Path) -> bool:
    """Whether the name is taken; a dangling link counts, for the error should be about the link."""
    return path.exists() or path.is_symlink()


def _no_weights(directory: Path, lacking: str) -> str:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return (
            f"{directory} has {shown(pickles[0])} but no safetensors; "
            f"only safetensors are read, convert it first"
        )
    return f"{directory} has {lacking}; pass a complete Hugging Face directory"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _parse_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {what} is not valid JSON ({shown(error)}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {what} is not a JSON object; download it again")
    return value


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, from an index file. The names are checked where they are opened. Raises
    ModelError for anything but a JSON object with a `weight_map` of strings that are no pickles.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is no safetensors index")
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    weight_map = _parse_json(path, text, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{path}: weight_map must map tensor names to file names; download it again")
    for name, file in weight_map.items():
        if file.endswith(_PICKLES):
            raise ModelError(
                f"{path}: {shown(name)} is in {shown(file)}; only safetensors are read, convert it first"
            )
    return weight_map


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises ModelError unless they fill the file without gap or
    overlap.
    """
    try:
        size, content = path.stat().st_size, header_bytes(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    length = int.from_bytes(content[:8], "little")
    if size < 8 or length > MAX_JSON_BYTES:
        raise ModelError(f"{path}: header of {length} bytes; truncated, or not a safetensors file")
    return parse_header(path, content, size=size)


def header_bytes(path: Path) -> bytes:
    """The first bytes of a safetensors file, its header, as far as they are there and no more than a header
    may have. OSError comes from the disk.
    """
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), MAX_JSON_BYTES))


def parse_header(path: Path, content: bytes, *, size: int | None) -> dict[str, TensorInfo]:
    """The tensors that a header, the first bytes of the file `path`, describes. `size` is the file's in
    bytes; None where only the header is there. Raises ModelError like `read_header`.
    """
    data_start = 8 + int.from_bytes(content[:8], "little")
    if len(content) != data_start:
        raise ModelError(f"{path} is truncated inside its header; download it again")
    entries = _parse_json(path, content[8:], "the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ModelError(f"{path}: __metadata__ of the header must map names to texts; download it again")
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in entries.items()]
    end = data_start
    for info in sorted(infos, key=lambda info: (info.start, info.stop)):
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise ModelError(
                f"{path}: tensor {shown(info.name)} {kind}; the file is corrupt, download it again"
            )
        end = info.stop
        if size is not None and end > size:
            raise ModelError(
                f"{path} is truncated: tensor {shown(info.name)} ends at {end}, the file at {size} bytes"
            )
    if size is not None and end != size:
        raise ModelError(
            f"{path}: {size - end} bytes behind the last tensor; the file is corrupt, download it again"
        )
    return {info.name: info for info in infos}


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    wrong = ModelError(f"{path}: header entry of tensor {shown(name)} is malformed; download it again")
    if not isinstance(entry, dict):
        raise wrong
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise wrong
    start, stop = offsets
    if stop < start:
        raise ModelError(
            f"{path}: tensor {shown(name)} ends before it starts; the file is corrupt, download it again"
        )
    if dtype in _ITEM_BYTES and stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ModelError(
            f"{path}: tensor {shown(name)} of shape {shown(list(shape))} and dtype {dtype} has "
            f"{stop - start} bytes; the file is corrupt, download it again"
        )
    return TensorInfo(
        name=name,
        stored_dtype=dtype,
        shape=shape,
        file=path,
        start=data_start + start,
        stop=data_start + stop,
    )


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Whole numbers that fit 64 bits, and few of them: their product is taken, and they are printed."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(item) is int and 0 <= item < 2**63 for item in value) else None


def model_tensors(source: HfWeights) -> list[str]:
    """Names of the tensors that are weights: rotary `inv_freq` buffers of old checkpoints are not."""
    return [name for name in source.names() if not _BUFFERS.fullmatch(name)]


def refuse_fused_experts(where: Path, names: Iterable[str]) -> None:
    """Raise ModelError if all experts of a layer are in one tensor, as transformers has them in memory."""
    if fused := [name for name in names if _FUSED.fullmatch(name)]:
        raise ModelError(
            f"{where}: weight {shown(fused[0])} holds all experts of a layer at once{and_more(fused)}; save "
            f"the model with transformers' save_pretrained, which writes one tensor an expert, as on the hub"
        )


def check_weights(
    source: HfWeights, weights: Mapping[str, Weight], *, described_by: str = "config.json"
) -> None:
    """Raise ModelError unless the checkpoint holds exactly the tensors of the map, in shape and of a float
    dtype. `described_by` is what the map was made from.

    Rotary `inv_freq` buffers are ignored. With tied embeddings `lm_head.weight` may be stored too, but only
    as the same bytes as the embedding: anything else is an untied model under a wrong config. Values are not
    looked at.
    """
    where, expected = source.directory, hf_tensors(weights)
    found, stored = model_tensors(source), set(source.names())
    refuse_fused_experts(where, found)
    if missing := [name for name in expected if name not in stored]:
        raise ModelError(
            f"{where}: weight {missing[0]} {list(expected[missing[0]].shape)} is missing{and_more(missing)}; "
            f"the files do not fit {described_by}"
        )
    for name in expected:  # before the surplus, which scales of quantised weights are
        if (dtype := source.dtype(name)) not in WEIGHT_DTYPES:
            raise ModelError(
                f"{where}: weight {name} has dtype {_CODES[dtype]}, a quantised source; "
                f"convert from the bf16 checkpoint"
            )
    copies = (LM_HEAD,) if EMBEDDING in expected else ()
    if surplus := [name for name in found if name not in expected and name not in copies]:
        raise ModelError(
            f"{where}: weight {shown(surplus[0])} has no place in the model{and_more(surplus)}; "
            f"the files do not fit {described_by}"
        )
    shapes = {name: source.shape(name) for name in expected}
    if wrong := [name for name in expected if shapes[name] != tuple(expected[name].shape)]:
        raise ModelError(
            f"{where}: weight {wrong[0]} has shape {list(shapes[wrong[0]])}, {described_by} asks for "
            f"{list(expected[wrong[0]].shape)}{and_more(wrong)}"
        )
    if LM_HEAD in found and LM_HEAD not in expected and not _same_bytes(source, LM_HEAD, EMBEDDING):
        raise ModelError(
            f"{where}: config.json says tie_word_embeddings, but {LM_HEAD} differs from {EMBEDDING}; "
            f"set tie_word_embeddings to false, or remove {LM_HEAD}"
        )


def _same_bytes(source: HfWeights, first: str, second: str) -> bool:
    if (source.shape(first), source.dtype(first)) != (source.shape(second), source.dtype(second)):
        return False
    return all(
        torch.equal(*(source.read_rows(name, *rows).view(torch.uint8) for name in (first, second)))
        for rows in row_blocks(source, first)
    )
