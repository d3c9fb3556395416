"""`braid convert`, `braid merge` and `braid verify`: flags, and the table or line that they print."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.config.options import ParallelOptions
from engine.config.parallel import ParallelLayout
from engine.config.parse import help_text, parse
from engine.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from converters.convert import ConvertReport


@dataclass(kw_only=True)
class ConvertOptions:
    """Flags of `braid convert`."""

    to: Literal["mcore", "hf"] | None = None
    """Direction: a Megatron checkpoint, or a Hugging Face directory."""

    model: str | None = None
    """Hugging Face directory to read (with --to mcore)."""

    adapter: str | None = None
    """PEFT LoRA adapter of --model: converts the adapter instead of the model (with --to mcore)."""

    checkpoint: str | None = None
    """Megatron checkpoint to read (with --to hf): a converted one, or checkpoint-<step> of a run. One of LoRA
    adapters becomes a PEFT directory.
    """

    output_dir: str | None = None
    """Directory to write; must not exist or be empty."""

    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Cast the weights; default: as they are stored."""

    max_shard_size: str = "5GB"
    """Largest safetensors file, as 500MB, 5GB or 5GiB."""

    tensor_model_parallel_size: int = 1
    """Checked against the model; the stored checkpoint is layout-free and loads under every degree."""

    pipeline_model_parallel_size: int = 1
    """Checked against the model; the stored checkpoint is layout-free and loads under every degree."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Checked against the model; the stored checkpoint is layout-free and loads under every degree."""


@dataclass(kw_only=True)
class MergeOptions:
    """Flags of `braid merge`."""

    model: str | None = None
    """Hugging Face directory of the base; it is not changed."""

    adapter: str | None = None
    """PEFT LoRA adapter of that base."""

    output_dir: str | None = None
    """Directory to write; must not exist or be empty."""

    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Cast the weights; default: as the base stores them. The sum is always taken in fp32."""

    max_shard_size: str = "5GB"
    """Largest safetensors file, as 500MB, 5GB or 5GiB."""


@dataclass(kw_only=True)
class VerifyOptions:
    """Flags of `braid verify`."""

    model: str | None = None
    """Hugging Face directory that is right by definition."""

    checkpoint: str | None = None
    """What is compared with it: a Megatron checkpoint or a Hugging Face directory."""

    report: str | None = None
    """File for a JSON report."""


def convert(argv: Sequence[str]) -> int:
    """The command `braid convert`. Returns the exit code; raises UserError."""
    if "--help" in argv or "-h" in argv:
        print("usage: braid convert --to mcore|hf [--flag value ...]\n" + help_text(ConvertOptions))
        return 0
    options, given = parse(ConvertOptions, argv)
    if options.to is None:
        raise ConfigError("no direction given; pass --to mcore or --to hf")
    source, other = ("model", "checkpoint") if options.to == "mcore" else ("checkpoint", "model")
    if getattr(options, source) is None:
        raise ConfigError(f"--to {options.to} reads --{source}; pass it")
    if getattr(options, other) is not None:
        raise ConfigError(f"--{other} does not go with --to {options.to}, which reads --{source}")
    if options.output_dir is None:
        raise ConfigError("no output directory given; pass --output_dir DIR")
    if options.to == "mcore":
        _check_layout(options)
        if "max_shard_size" in given:
            raise ConfigError("max_shard_size does not go with --to mcore; it is for safetensors files")
    elif options.adapter is not None:
        raise ConfigError("--adapter does not go with --to hf; a checkpoint knows what it holds")
    report = _convert_adapter(options, given) or _convert_model(options)
    print(report.line())
    return 0


def _convert_adapter(options: ConvertOptions, given: set[str]) -> "ConvertReport | None":
    """Converts if what is to be converted is a LoRA adapter."""
    from converters.adapter import adapter_to_mcore, holds_adapter, to_peft

    if options.adapter is None and not (options.to == "hf" and holds_adapter(options.checkpoint or "")):
        return None
    for name in ("torch_dtype", "max_shard_size"):
        if name in given:
            raise ConfigError(
                f"{name} does not go with a LoRA adapter, which keeps its dtype and is one file"
            )
    if options.adapter is None:
        return to_peft(options.checkpoint or "", options.output_dir or "")
    return adapter_to_mcore(options.model or "", options.adapter, options.output_dir or "")


def _convert_model(options: ConvertOptions) -> "ConvertReport":
    from converters.convert import to_hf, to_mcore

    dtype, target = _torch_dtype(options.torch_dtype), options.output_dir or ""
    if options.to == "mcore":
        return to_mcore(options.model or "", target, dtype=dtype)
    size = _bytes(options.max_shard_size)
    return to_hf(options.checkpoint or "", target, dtype=dtype, max_shard_size=size)


def merge(argv: Sequence[str]) -> int:
    """The command `braid merge`. Returns the exit code; raises UserError."""
    if "--help" in argv or "-h" in argv:
        print(
            "usage: braid merge --model DIR --adapter DIR --output_dir DIR [--flag value ...]\n"
            + help_text(MergeOptions)
        )
        return 0
    options, _ = parse(MergeOptions, argv)
    if options.model is None or options.adapter is None or options.output_dir is None:
        raise ConfigError(
            "merge adds --adapter DIR to --model DIR and writes --output_dir DIR; pass all three"
        )
    from converters.merge import merge as merge_adapter

    report = merge_adapter(
        options.model,
        options.adapter,
        options.output_dir,
        dtype=_torch_dtype(options.torch_dtype),
        max_shard_size=_bytes(options.max_shard_size),
    )
    print(report.line())
    return 0


def _check_layout(options: ConvertOptions) -> None:
    """A layout that the model cannot take is refused here, not when the run that needs it starts."""
    from engine.model.spec import load_model_spec

    spec = load_model_spec(options.model or "")
    degrees = ParallelOptions(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=options.virtual_pipeline_model_parallel_size,
    )
    ranks = max(1, options.tensor_model_parallel_size) * max(1, options.pipeline_model_parallel_size)
    layout = ParallelLayout.resolve(degrees, num_layers=spec.num_layers, world_size=ranks)
    spec.check_tensor_parallel(layout.tp)


def _torch_dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _bytes(text: str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in units:
        raise ConfigError(f"max_shard_size must be a size like 500MB or 5GiB, not {text!r}")
    return int(float(match[1]) * units[match[2].upper()])


def verify(argv: Sequence[str]) -> int:
    """The command `braid verify`: 0 if both hold the same model, 1 if not. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        print("usage: braid verify --model DIR --checkpoint DIR\n" + help_text(VerifyOptions))
        return 0
    options, _ = parse(VerifyOptions, argv)
    if options.model is None or options.checkpoint is None:
        raise ConfigError("verify compares --model DIR with --checkpoint DIR; pass both")
    from rich.console import Console

    from converters.verify import verify as compare

    report = compare(options.model, options.checkpoint)
    if report.same:
        print(report.summary())
    else:
        Console(width=max(100, Console().width)).print(report.table())
    if options.report is not None:
        _write_report(Path(options.report), report.as_dict())
    return 0 if report.same else 1


def _write_report(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"--report {path} cannot be written: {error.strerror}") from None
