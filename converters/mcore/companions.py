"""What a Megatron checkpoint carries besides weights, so that it can become a Hugging Face checkpoint on its
own.

`hf_companions/` has the model's configuration, tokenizer and licence byte by byte, `hf_layout/` the headers
and the index of its weight files, `braid.json` what the converter knows of the source. The training engine
calls `write_companions` for its checkpoints, too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from converters.companion_files import copy_companions
from converters.hf.dequantise import dequantised_config
from converters.hf.layout import keep_layout, source_layout
from converters.hf.reader import (
    INDEX_FILE,
    LM_HEAD,
    MAX_JSON_BYTES,
    SINGLE_FILE,
    WEIGHT_DTYPES,
    HfReader,
    HfWeights,
)
from engine.errors import CheckpointError, ModelError
from engine.model.spec import ModelSpec, load_model_spec
from engine.storage.durable import fsync
from engine.storage.files import dtype_name, write_json

COMPANIONS_DIR = "hf_companions"
INFO_FILE = "braid.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What the Hugging Face checkpoint was that a Megatron checkpoint came from (`braid.json`)."""

    architecture: str
    dtype: str | None
    """The source's dtype, such as "bfloat16"; None for a mixed source or one without weights."""
    tied_embeddings: bool
    lm_head_copy: bool
    """Embeddings are tied, but the source stored `lm_head.weight` all the same; an export does so again."""
    hf_dtypes: Mapping[str, str] | None
    """dtype by Hugging Face name where the source mixes them and the conversion kept them; otherwise None."""
    adapter_dtype: str | None = None
    """In a checkpoint of LoRA adapters, the dtype of the adapter that it came from."""


def describe_source(spec: ModelSpec, source: HfWeights | None, *, keep_dtypes: bool = False) -> SourceInfo:
    """Of a model and its weights, as they are converted; those may be absent. Nothing is read."""
    tensors = {} if source is None else {name: source.dtype(name) for name in source.names()}
    dtypes = {name: dtype for name, dtype in tensors.items() if dtype in WEIGHT_DTYPES}
    kinds = set(dtypes.values())
    return SourceInfo(
        architecture=spec.architecture,
        dtype=dtype_name(kinds.pop()) if len(kinds) == 1 else None,
        tied_embeddings=spec.tied_embeddings,
        lm_head_copy=spec.tied_embeddings and LM_HEAD in tensors,
        hf_dtypes={n: dtype_name(d) for n, d in dtypes.items()}
        if keep_dtypes and len(set(dtypes.values())) > 1
        else None,
    )


def _weights_of(model_dir: str | Path) -> HfReader | None:
    """Its weights, if it has any."""
    has_weights = any((Path(model_dir) / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    return HfReader(model_dir) if has_weights else None


def write_companions(
    model_dir: str | Path,
    checkpoint_dir: str | Path,
    *,
    source: SourceInfo | None = None,
    adapter_dtype: str | None = None,
    dequantised_to: torch.dtype | None = None,
) -> SourceInfo:
    """Put `hf_companions/`, `hf_layout/` and `braid.json` into a Megatron checkpoint directory, which exists.

    Call it on one rank. Repeating it replaces the files. With `dequantised_to`, the dtype that fp8 weights
    became, the configuration speaks of that dtype, and no `hf_layout/` is kept, for the files of fp8 weights
    cannot come back. Raises ModelError for what is wrong with `model_dir`.
    """
    reader = _weights_of(model_dir) if dequantised_to is None else None
    info = replace(source or describe_source(load_model_spec(model_dir), reader), adapter_dtype=adapter_dtype)
    target = Path(checkpoint_dir) / COMPANIONS_DIR
    target.mkdir(exist_ok=True)
    copy_companions(model_dir, target, error=ModelError)
    if dequantised_to is not None:
        write_json(target / "config.json", dequantised_config(model_dir, dequantised_to))
    fsync(target)
    if reader is not None and adapter_dtype is None:
        keep_layout(source_layout(reader), Path(checkpoint_dir))
    write_json(Path(checkpoint_dir) / INFO_FILE, {"format": _FORMAT, **asdict(info)})
    return info


def read_source_info(checkpoint_dir: str | Path) -> SourceInfo:
    """The `braid.json` of a checkpoint. Raises CheckpointError if it or `hf_companions/config.json` is
    missing.
    """
    directory = Path(checkpoint_dir)
    path = directory / INFO_FILE
    if not path.is_file() or not (directory / COMPANIONS_DIR / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {directory} has no {INFO_FILE} or {COMPANIONS_DIR}/config.json; it was not "
            f"written by braid, or was copied incompletely"
        )
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes; use another checkpoint")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has not the format {_FORMAT}; convert with the braid version that wrote it"
        )
    return _source_info(path, value)


def _source_info(path: Path, value: Mapping[str, Any]) -> SourceInfo:
    dtypes = value.get("hf_dtypes")
    names = {dtype_name(dtype) for dtype in WEIGHT_DTYPES}
    if dtypes is not None and not (isinstance(dtypes, dict) and set(map(str, dtypes.values())) <= names):
        raise CheckpointError(f"{path}: hf_dtypes must map tensor names to {', '.join(sorted(names))}")
    adapter_dtype = value.get("adapter_dtype")
    if adapter_dtype is not None and str(adapter_dtype) not in names:
        raise CheckpointError(f"{path}: adapter_dtype must be one of {', '.join(sorted(names))}")
    return SourceInfo(
        architecture=str(value.get("architecture")),
        dtype=value.get("dtype"),
        tied_embeddings=bool(value.get("tied_embeddings")),
        lm_head_copy=bool(value.get("lm_head_copy")),
        hf_dtypes=dtypes,
        adapter_dtype=adapter_dtype,
    )


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name that `dtype_name` made."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype
