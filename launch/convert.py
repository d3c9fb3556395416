"""`braid convert` and `braid merge`: flags, the plan of a dry run, the progress of a real one."""

import math
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engine.config.options import LaunchOptions, ParallelOptions
from engine.config.parallel import ParallelLayout
from engine.config.parse import help_text, parse
from engine.errors import ConfigError
from launch.models import locate
from launch.processes import (
    World,
    find_world,
    launch_environment,
    run_worker,
    start_processes,
    started_by_braid,
)

if TYPE_CHECKING:
    from converters.conversion import Conversion
    from converters.transfer import TransferOptions

_MIN_MEMORY = 16_000_000


@dataclass(kw_only=True)
class OutputOptions:
    """What is written, and how."""

    output_dir: str | None = None
    """Directory to write; must not exist or be empty."""

    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Cast the weights; default: as they are stored."""

    max_shard_size: str | None = None
    """Largest safetensors file, as 500MB, 5GB or 5GiB; default: the files of the source where they fit, else
    5GB.
    """

    workers: int | None = None
    """Files that each process writes at the same time; default: one a CPU, four at most."""

    max_memory: str = "256MB"
    """Tensor data that a process holds at once, whatever the size of the model."""

    dry_run: bool = False
    """Check everything and print what would be written, and write nothing."""


@dataclass(kw_only=True)
class LayoutOptions:
    """Layout that the checkpoint will be loaded under. It is only checked: what is stored is layout-free."""

    tensor_model_parallel_size: int = 1
    """Checked against the model."""

    pipeline_model_parallel_size: int = 1
    """Checked against the model."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Checked against the model."""

    expert_model_parallel_size: int = 1
    """Checked against the model."""

    expert_tensor_parallel_size: int = 1
    """Checked against the model."""


@dataclass(kw_only=True)
class ConvertOptions:
    """Flags of `braid convert`."""

    left_out: ClassVar[tuple[str, ...]] = ("max_restarts",)

    to: Literal["mcore", "hf"] | None = None
    """Direction: a Megatron checkpoint, or a Hugging Face directory."""

    model: str | None = None
    """Hugging Face directory to read, or the id of a model (with --to mcore)."""

    use_hf: bool | None = None
    """Look an id up at Hugging Face, or (false) at ModelScope."""

    adapter: str | None = None
    """PEFT LoRA adapter of --model: converts the adapter instead of the model (with --to mcore)."""

    dequantise: bool = False
    """Convert an fp8 --model, as Qwen publishes them, to bf16 or --torch_dtype (with --to mcore)."""

    checkpoint: str | None = None
    """Megatron checkpoint to read (with --to hf): a converted one, or checkpoint-<step> of a run. One of LoRA
    adapters becomes a PEFT directory.
    """

    output: OutputOptions = field(default_factory=OutputOptions)
    layout: LayoutOptions = field(default_factory=LayoutOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)


@dataclass(kw_only=True)
class MergeOptions:
    """Flags of `braid merge`."""

    left_out: ClassVar[tuple[str, ...]] = ("max_restarts",)

    model: str | None = None
    """Hugging Face directory of the base, or its id; it is not changed."""

    use_hf: bool | None = None
    """Look an id up at Hugging Face, or (false) at ModelScope."""

    adapter: str | None = None
    """PEFT LoRA adapter of that base."""

    output: OutputOptions = field(default_factory=OutputOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)


def convert(argv: Sequence[str]) -> int:
    """The command `braid convert`. Returns the exit code; raises UserError."""
    if "--help" in argv or "-h" in argv:
        print("usage: braid convert --to mcore|hf [--flag value ...]\n" + help_text(ConvertOptions))
        return 0
    options, given = parse(ConvertOptions, argv, launch_environment())
    if options.to is None:
        raise ConfigError("no direction given; pass --to mcore or --to hf")
    models: dict[str, str] = {}
    source, other = ("model", "checkpoint") if options.to == "mcore" else ("checkpoint", "model")
    if getattr(options, source) is None:
        raise ConfigError(f"--to {options.to} reads --{source}; pass it")
    if getattr(options, other) is not None:
        raise ConfigError(f"--{other} does not go with --to {options.to}, which reads --{source}")
    if options.to == "mcore":
        if options.dequantise and options.adapter is not None:
            raise ConfigError("--dequantise does not go with --adapter; it is for the weights of a model")
        if "max_shard_size" in given:
            raise ConfigError("max_shard_size does not go with --to mcore; it is for safetensors files")
        models = {str(options.model): locate(str(options.model), use_hf=options.use_hf)}
        options.model = models[str(options.model)]
        _check_layout(options)
    elif options.adapter is not None:
        raise ConfigError("--adapter does not go with --to hf; a checkpoint knows what it holds")
    elif options.dequantise:
        raise ConfigError("--dequantise does not go with --to hf; a Megatron checkpoint is never fp8")
    job = _Job(words=["convert", *argv], output=options.output, launch=options.launch, models=models)
    return _run(lambda: _plan(options, given), lambda: _about(options), job)


def _plan(options: ConvertOptions, given: set[str]) -> "Conversion":
    from converters.adapter import holds_adapter, plan_adapter_to_mcore, plan_to_peft
    from converters.convert import plan_to_hf, plan_to_mcore

    model, checkpoint, dtype = options.model or "", options.checkpoint or "", _dtype(options.output)
    if options.adapter is not None or (options.to == "hf" and holds_adapter(checkpoint)):
        for name in ("torch_dtype", "max_shard_size"):
            if name in given:
                raise ConfigError(
                    f"{name} does not go with a LoRA adapter, which keeps its dtype and is one file"
                )
        return (
            plan_to_peft(checkpoint)
            if options.to == "hf"
            else plan_adapter_to_mcore(model, options.adapter or "")
        )
    if options.to == "mcore":
        return plan_to_mcore(model, dtype=dtype, dequantise=options.dequantise)
    return plan_to_hf(checkpoint, dtype=dtype, max_shard_size=_shard_size(options.output))


def merge(argv: Sequence[str]) -> int:
    """The command `braid merge`. Returns the exit code; raises UserError."""
    if "--help" in argv or "-h" in argv:
        print(
            "usage: braid merge --model DIR --adapter DIR --output_dir DIR [--flag value ...]\n"
            + help_text(MergeOptions)
        )
        return 0
    options, _ = parse(MergeOptions, argv, launch_environment())
    if options.model is None or options.adapter is None:
        raise ConfigError("merge adds --adapter DIR to --model DIR; pass both")
    model, adapter, output = locate(options.model, use_hf=options.use_hf), options.adapter, options.output

    def plan() -> "Conversion":
        from converters.merge import plan_merge

        return plan_merge(model, adapter, dtype=_dtype(output), max_shard_size=_shard_size(output))

    job = _Job(words=["merge", *argv], output=output, launch=options.launch, models={options.model: model})
    return _run(plan, lambda: [_model_line(model)], job)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A conversion, whatever it is of."""

    words: Sequence[str]
    """The command line, behind `braid`."""
    output: OutputOptions
    launch: LaunchOptions
    models: Mapping[str, str]
    """Directories of models, by the names that they were asked for by."""


def _run(plan: Callable[[], "Conversion"], about: Callable[[], Sequence[str]], job: _Job) -> int:
    """Plan, and write, or print the plan behind what there is to say `about` its source. Every process of the
    job takes its share.
    """
    began, output = time.monotonic(), job.output
    if output.output_dir is None:
        raise ConfigError("no output directory given; pass --output_dir DIR")
    world = find_world(job.launch, job.words[0])
    options = _transfer_options(output, world)
    if output.dry_run:
        if world.rank == 0:
            _print_plan(plan(), options, output.output_dir, about())
        return 0
    if world.size > 1 and not world.started:
        plan()  # what is wrong with the source is said before any process starts
        return start_processes(job.launch, world, job.words, began=began, models=job.models)
    work = partial(_write, plan, output.output_dir, options, world, job.words)
    if world.started and started_by_braid():  # which says what the first rank that failed said
        return run_worker(world, work, lambda: "")
    work()
    return 0


def _write(
    plan: Callable[[], "Conversion"],
    output_dir: str,
    options: "TransferOptions",
    world: World,
    words: Sequence[str],
) -> None:
    from dataclasses import replace

    from converters.conversion import carry_out

    conversion = plan()
    share = sum(file.nbytes for file in conversion.files)
    with _progress(share if world.size == 1 else 0) as progress:
        report = carry_out(
            conversion,
            output_dir,
            options=replace(options, progress=progress),
            command=shlex.join(["braid", *words]),
        )
    if world.rank == 0:
        print(report.line())


def worker_count(asked: int | None) -> int:
    """Threads of a command that reads or writes weights. Raises ConfigError."""
    workers = min(4, os.cpu_count() or 1) if asked is None else asked
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    return workers


def _transfer_options(output: OutputOptions, world: World) -> "TransferOptions":
    from converters.transfer import Crew, TransferOptions

    workers = worker_count(output.workers)
    memory = _bytes("max_memory", output.max_memory)
    if memory < _MIN_MEMORY * workers:
        least = f"{_MIN_MEMORY * workers // 10**6}MB"
        raise ConfigError(
            f"max_memory must be at least {least} for {workers} workers, not {output.max_memory}"
        )
    names = (
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "MASTER_PORT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
    )
    run = "/".join(os.environ.get(name, "") for name in names)
    crew = Crew(rank=world.rank, size=world.size, run=run) if world.started else Crew()
    return TransferOptions(workers=workers, max_memory=memory, crew=crew)


def _print_plan(
    conversion: "Conversion", options: "TransferOptions", output_dir: str, about: Sequence[str]
) -> None:
    """Raises OutputError for what the conversion would refuse of its target."""
    import shutil
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from converters.conversion import check_output

    needed = check_output(conversion, output_dir)
    for line in about:
        print(line)
    table = Table(title=f"{output_dir} ({conversion.kind})")
    table.add_column("file")
    table.add_column("GB", justify="right")
    for file in conversion.files:
        table.add_row(file.name, f"{file.nbytes / 1e9:.3f}")
    Console(width=max(100, Console().width)).print(table)
    place = next(path for path in Path(output_dir).absolute().parents if path.exists())
    print(
        f"{conversion.tensors} tensors, {conversion.nbytes / 1e9:.3f} GB, read from "
        f"{conversion.source.directory}\n"
        f"{shutil.disk_usage(place).free / 1e9:.3f} GB free on {place}, {needed / 1e9:.3f} GB needed; "
        f"{options.workers} workers hold at most {options.max_memory / 1e6:.0f} MB of tensors\n"
        f"checked: configuration, names and shapes of all tensors, output directory and room; nothing was "
        f"written"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar with GB/s and the time left on a terminal; nothing elsewhere, where a script reads the output."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not (total and console.is_interactive):
        yield None
        return
    columns = (BarColumn(bar_width=32), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(count: int) -> None:
            with lock:
                bar.advance(task, count)

        yield advance


def _about(options: ConvertOptions) -> list[str]:
    """What is converted, and the layout that it was checked for."""
    from converters.mcore.companions import COMPANIONS_DIR

    if options.to == "hf":
        return [_model_line(options.checkpoint or "", COMPANIONS_DIR)]
    layout = _check_layout(options)
    model = _model_line(options.model or "", fp8=options.dequantise)
    return [model, f"layout: {layout.summary()}", layout.grid()]


def _model_line(directory: str, below: str = "", *, fp8: bool = False) -> str:
    from engine.model.spec import load_model_spec

    return f"model: {directory} ({load_model_spec(os.path.join(directory, below), fp8=fp8).summary()})"


def _check_layout(options: ConvertOptions) -> ParallelLayout:
    """A layout that the model cannot take is refused here, not when the run that needs it starts."""
    from engine.model.spec import load_model_spec

    spec, layout = load_model_spec(options.model or "", fp8=options.dequantise), options.layout
    degrees = ParallelOptions(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )
    experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    ranks = max(1, layout.pipeline_model_parallel_size) * max(
        1, math.lcm(layout.tensor_model_parallel_size, experts)
    )
    resolved = ParallelLayout.resolve(degrees, num_layers=spec.num_layers, world_size=ranks)
    spec.check_tensor_parallel(resolved.tp)
    spec.check_expert_parallel(resolved.ep, resolved.etp)
    return resolved


def _dtype(output: OutputOptions) -> Any:
    if output.torch_dtype is None:
        return None
    import torch

    return getattr(torch, output.torch_dtype)


def _shard_size(output: OutputOptions) -> int | None:
    if output.max_shard_size is None:
        return None
    size = _bytes("max_shard_size", output.max_shard_size)
    if size < 1:
        raise ConfigError(f"max_shard_size must be a positive number of bytes, not {output.max_shard_size}")
    return size


def _bytes(name: str, text: str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in units:
        raise ConfigError(f"{name} must be a size like 500MB or 5GiB, not {text!r}")
    return int(float(match[1]) * units[match[2].upper()])
