"""A benchmark on paper: its options checked against the model and the processes, before any rank starts."""

from pathlib import Path

from engine.config.batch import resolve_batch_shape
from engine.config.bench import TrainBenchConfig
from engine.config.options import DataOptions, RunOptions, SftConfig
from engine.errors import ConfigError, OutputError
from engine.model.spec import ModelSpec, load_model_spec
from launch.bench.shapes import spec_of_shape
from launch.blueprint import LEARNING_RATES, Blueprint, check_ranges, check_writable, draw_lora, lay_out
from launch.processes import World, command_began

BREAKDOWN_STEPS = 2


def read_spec(config: TrainBenchConfig) -> ModelSpec:
    """The model that is benchmarked. Raises ConfigError unless one is named, in one way; ModelError for what
    is wrong with a directory.
    """
    shape, directory = config.bench.shape, config.model.model
    if (shape is None) == (directory is None):
        given = "both --shape and --model are given" if shape is not None else "no model is given"
        raise ConfigError(f"{given}; pass --shape NAME, or --model DIR for the config.json of a directory")
    return spec_of_shape(shape) if shape is not None else load_model_spec(str(directory))


def total_steps(config: TrainBenchConfig) -> int:
    """All steps that a run takes: warm-up, measured, under timers, and traced."""
    bench = config.bench
    after = (BREAKDOWN_STEPS if bench.breakdown else 0) + (bench.trace is not None)
    return bench.warmup_steps + bench.steps + after


def draw_bench(config: TrainBenchConfig, world: World) -> Blueprint:
    """The blueprint of a run of training with these options, on rows that are still to be made. Raises
    UserError; imports neither torch nor Megatron.
    """
    bench, spec = config.bench, read_spec(config)
    _check_options(config)
    run = as_sft(config)
    check_ranges(run)
    layout = lay_out(run, spec, world.size)
    shape = resolve_batch_shape(run.batch, data_parallel_size=layout.dp)
    layout.check_micro_batches(shape.accumulation)
    lora = draw_lora(run, spec, layout)
    if run.optimizer.learning_rate is None:
        run.optimizer.learning_rate = LEARNING_RATES[run.model.train_type]
    return Blueprint(
        config=run,
        spec=spec,
        layout=layout,
        shape=shape,
        model_dir=Path(bench.shape or str(run.model.model)),
        output_dir=Path(bench.output_dir or "."),
        resume=None,
        lora=lora,
        started=command_began(),
    )


def as_sft(config: TrainBenchConfig) -> SftConfig:
    """The options as `braid sft` would have them; no data set is named."""
    bench = config.bench
    config.batch.max_steps = total_steps(config)
    return SftConfig(
        model=config.model,
        lora=config.lora,
        data=DataOptions(
            max_length=bench.max_length,
            packing=bench.lengths == "packed",
            dataloader_num_workers=bench.dataloader_num_workers,
        ),
        batch=config.batch,
        optimizer=config.optimizer,
        recompute=config.recompute,
        parallel=config.parallel,
        moe=config.moe,
        run=RunOptions(
            seed=bench.seed,
            deterministic=bench.deterministic,
            output_dir=bench.output_dir,
            dry_run=bench.dry_run,
        ),
        launch=config.launch,
    )


def _check_options(config: TrainBenchConfig) -> None:
    bench = config.bench
    least = {"steps": 1, "warmup_steps": 0, "max_length": 2, "dataloader_num_workers": 0}
    for name, bound in least.items():
        if getattr(bench, name) < bound:
            raise ConfigError(f"{name} must be at least {bound}, not {getattr(bench, name)}")
    if not 0 < bench.supervised_share <= 1:
        raise ConfigError(f"supervised_share must be in (0, 1], not {bench.supervised_share}")
    if bench.trace is not None and not bench.trace.endswith((".json", ".json.gz")):
        raise ConfigError(f"trace {bench.trace} must end with .json or .json.gz")


def check_outputs(output_dir: str | None, trace: str | None = None) -> None:
    """Raise OutputError unless results can be written without touching other files."""
    if trace is not None:
        if Path(trace).exists():
            raise OutputError(f"trace {trace} exists; choose another file")
        check_writable(Path(trace).parent)
    if output_dir is None:
        return
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"output_dir {directory} is a file; choose a directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise OutputError(f"output_dir {directory} is in use; choose another, or empty it")
    check_writable(directory)
