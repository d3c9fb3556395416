"""The options of `braid validate`. Pure Python."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from engine.config.options import LaunchOptions
from engine.errors import ConfigError

PARTS = ("doctor", "comm", "parity", "curves", "resume", "speed")


@dataclass(kw_only=True)
class ValidateOptions:
    """What is looked at, and where results go."""

    output_dir: str | None = None
    """Directory for results and the report: new, or with --resume that of an earlier call."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """What to do, separated by commas: doctor (what the machine has), comm (bandwidths), parity (loss and
    gradient norm against one GPU), curves (a run against that of one GPU), resume (kill, and go on in another
    layout), speed (tokens/s, MFU, scaling).
    """

    layouts: list[str] = field(default_factory=list)
    """Only these, by the names in the report, separated by commas."""

    resume: bool = False
    """Keep the results that output_dir has, errors of layouts too; without it the directory must be empty."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; cpu tries the program itself, in small sizes."""

    transformer_impl: Literal["auto", "torch", "te"] = "auto"
    """Layers of runs in bf16; those in fp32 are of plain torch."""

    steps: int = 200
    """Steps of a loss curve."""

    part_timeout: float = 540.0
    """Seconds after which a part is ended; a later call with --resume goes on with what is missing."""

    task_timeout: float = 240.0
    """Seconds without a result after which a layout is taken to hang, and is ended."""

    comm_sizes: list[str] = field(default_factory=list)
    """Sizes of messages (default 1MiB 16MiB 256MiB, on CPUs 64KiB 1MiB)."""


@dataclass(kw_only=True)
class SpeedOptions:
    """What is measured for speed, by `braid bench train` with every weight trained, in full rows."""

    shape: str = "qwen2.5-7b"
    """A published model, such as qwen2.5-14b, or qwen3-30b-a3b for the layouts with experts."""

    scaling_shape: str | None = None
    """The model of DP 1, DP N and TP 2, which are compared with each other. Default: shape, or qwen2.5-1.5b
    where one card cannot hold it.
    """

    max_length: int = 4096
    """Tokens of a row."""

    accumulation: int = 8
    """Micro-batches, of one row, that a data-parallel rank adds up a step; for the bubble of a pipeline four
    times as many are measured too.
    """

    bench_steps: int = 3
    """Measured steps, after one to warm up."""

    bench_options: list[str] = field(default_factory=list)
    """Further options of `braid bench train`, as name=value: exp_avg_dtype=bfloat16."""


@dataclass(kw_only=True)
class Bounds:
    """How far a layout may be from one GPU; all relative."""

    fp32_loss_bound: float = 1e-5
    """Losses in fp32."""

    fp32_norm_bound: float = 1e-4
    """Gradient norms in fp32."""

    noise_factor: float = 3.0
    """What a layout computes in bf16 may be this many times as far from one GPU's as that is from one GPU's
    in fp32, and at least the three bounds that follow.
    """

    bf16_loss_bound: float = 2e-3
    """Losses in bf16."""

    bf16_norm_bound: float = 2e-2
    """Gradient norms in bf16."""

    curve_floor: float = 2e-3
    """Means of tenths of a loss curve in bf16; any single step may be twice as far."""

    resume_bound: float = 1e-4
    """Losses of a run that goes on in another layout, in fp32."""

    def in_bf16(self, floor: float, noise: float) -> float:
        """The bound of what one GPU's rounding moves by `noise`."""
        return max(floor, self.noise_factor * noise)


@dataclass(kw_only=True)
class ValidateConfig:
    """Everything `braid validate` is told."""

    left_out: ClassVar[tuple[str, ...]] = (
        "nnodes", "node_rank", "master_addr", "master_port", "max_restarts",
    )  # fmt: skip

    validate: ValidateOptions = field(default_factory=ValidateOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    bounds: Bounds = field(default_factory=Bounds)
    launch: LaunchOptions = field(default_factory=LaunchOptions)


def check(config: ValidateConfig) -> None:
    """Split lists at commas, and raise ConfigError for what cannot be."""
    options, speed = config.validate, config.speed
    options.parts, options.layouts = _split(options.parts), _split(options.layouts)
    for part in options.parts:
        if part not in PARTS:
            raise ConfigError(f"part {part!r} is not known; parts are {', '.join(PARTS)}")
    if options.output_dir is None:
        raise ConfigError("no output directory given; pass --output_dir DIR")
    least: dict[str, tuple[float, float]] = {
        "steps": (options.steps, 10),
        "part_timeout": (options.part_timeout, 1),
        "task_timeout": (options.task_timeout, 1),
        "accumulation": (speed.accumulation, 1),
        "bench_steps": (speed.bench_steps, 1),
    }
    for name, (value, bound) in least.items():
        if value < bound:
            raise ConfigError(f"{name} must be at least {bound}, not {value}")
    for name, value in vars(config.bounds).items():
        if value < 0:
            raise ConfigError(f"{name} must not be negative, not {value}")
    for word in speed.bench_options:
        if "=" not in word:
            raise ConfigError(f"bench_options are name=value, not {word!r}")


def _split(words: list[str]) -> list[str]:
    return [part for word in words for part in word.split(",") if part]
