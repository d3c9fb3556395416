"""The options of `braid bench`, beside those of training that it takes over."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from engine.config.options import (
    BatchOptions,
    LaunchOptions,
    LoraOptions,
    ModelOptions,
    MoeOptions,
    OptimizerOptions,
    ParallelOptions,
    RecomputeOptions,
)

# Options of training that would say nothing about a run of a few steps on random weights.
_NOT_OF_A_BENCHMARK = (
    "adapter", "num_train_epochs", "max_steps", "per_device_eval_batch_size", "min_lr", "warmup_ratio",
    "optimizer.warmup_steps", "warmup_type", "lr_scheduler_type", "max_restarts",
)  # fmt: skip


@dataclass(kw_only=True)
class BenchOptions:
    """What `braid bench train` trains on, what it measures, and where it writes the results."""

    shape: str | None = None
    """A published model by name, such as qwen2.5-7b, with random weights, or some of its layers, such as
    qwen3-30b-a3b-8-layers; an unknown name lists all. The alternative is --model DIR, of which only
    config.json is read.
    """

    steps: int = 5
    """Measured steps."""

    warmup_steps: int = 2
    """Steps before them, which are not measured."""

    max_length: int = 2048
    """Tokens of a full sequence."""

    lengths: Literal["packed", "even"] = "packed"
    """Rows of many lengths (log-normal, median max_length / 6), packed into sequences of max_length as
    packing does it; or rows of max_length tokens. Batch sizes count packs.
    """

    supervised_share: float = 1.0
    """Share of a row's tokens, from its end, that carry loss."""

    breakdown: bool = True
    """Take two more steps under timers, and say where their time goes."""

    trace: str | None = None
    """Write a Chrome trace of one more step on rank 0 to this file (.json or .json.gz)."""

    output_dir: str | None = None
    """New directory for the results as JSON, Markdown and PNG; default: print only."""

    dataloader_num_workers: int = 1
    """Background threads that assemble micro-batches ahead of the step; 0 assembles them in the step."""

    seed: int = 42
    """Seed of weights, rows and their order."""

    deterministic: bool = False
    """Deterministic kernels only; CPU runs are deterministic without it."""

    dry_run: bool = False
    """Check everything, print the layout, the estimate of memory and the steps, or the cases of a sweep, and
    stop.
    """


@dataclass(kw_only=True)
class TrainBenchConfig:
    """Everything `braid bench train` is told."""

    left_out: ClassVar[tuple[str, ...]] = _NOT_OF_A_BENCHMARK

    bench: BenchOptions = field(default_factory=BenchOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    recompute: RecomputeOptions = field(default_factory=RecomputeOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    moe: MoeOptions = field(default_factory=MoeOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)


@dataclass(kw_only=True)
class CommOptions:
    """What `braid bench comm` measures."""

    sizes: list[str] = field(default_factory=list)
    """Sizes of a message, such as 64KiB 1MiB 1GiB or a number of bytes; default: 1MiB to 1GiB on CUDA, 64KiB
    to 16MiB on CPUs, by factors of 4.
    """

    iterations: int | None = None
    """Timed calls of every operation and size (default 20 on CUDA, 5 on CPUs)."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto takes CUDA where a GPU is visible."""

    output_dir: str | None = None
    """New directory for the results as JSON, Markdown and PNG; default: print only."""

    dry_run: bool = False
    """Check everything, print the process groups and messages, and stop."""


@dataclass(kw_only=True)
class CommBenchConfig:
    """Everything `braid bench comm` is told."""

    left_out: ClassVar[tuple[str, ...]] = (
        "virtual_pipeline_model_parallel_size", "cp_comm_type", "sequence_parallel",
        "decoder_layers_per_stage", "max_restarts",
    )  # fmt: skip

    comm: CommOptions = field(default_factory=CommOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)


@dataclass(kw_only=True)
class SweepOptions:
    """Which settings `braid bench sweep` tries; every one by `braid bench train` in processes of its own."""

    tensor_model_parallel_sizes: list[int] = field(default_factory=list)
    """Degrees to try; default: all that divide the number of processes."""

    pipeline_model_parallel_sizes: list[int] = field(default_factory=list)
    """Degrees to try; default: all that divide the number of processes."""

    context_parallel_sizes: list[int] = field(default_factory=lambda: [1])
    """Degrees to try."""

    expert_model_parallel_sizes: list[int] = field(default_factory=list)
    """Degrees to try; default: all that divide the number of processes, for models with experts."""

    micro_batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Rows of a micro-batch to try. Without global_batch_size the step of every case has 4 x the largest of
    them x the number of processes.
    """

    recompute: list[Literal["none", "selective", "full"]] = field(default_factory=lambda: ["none"])
    """Activation checkpointing to try."""

    case_timeout: float = 1800.0
    """Seconds after which a case is ended and counts as failed."""


@dataclass(kw_only=True)
class SweepBenchConfig(TrainBenchConfig):
    """Everything `braid bench sweep` is told. What is not swept goes to every case."""

    left_out: ClassVar[tuple[str, ...]] = (
        *_NOT_OF_A_BENCHMARK,
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size", "per_device_train_batch_size", "gradient_accumulation_steps",
        "gradient_checkpointing", "recompute_granularity", "recompute_modules", "decoder_layers_per_stage",
        "trace",
    )  # fmt: skip

    sweep: SweepOptions = field(default_factory=SweepOptions)
