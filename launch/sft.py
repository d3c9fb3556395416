"""`braid sft`: check what can be checked, start the ranks, and on each of them put the run together."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.batch import BatchShape, resolve_batch_shape
from engine.config.options import SftConfig
from engine.config.parallel import ParallelLayout
from engine.config.parse import flatten, help_text, parse
from engine.errors import CheckpointError, ConfigError, OutputError
from engine.model.spec import ModelSpec, load_model_spec
from launch.disk import check_room, full_disk_named
from launch.processes import World, find_world, launch_environment, open_world, run_worker, start_processes

if TYPE_CHECKING:
    from engine.data.batches import BatchPlan
    from engine.data.prepare import PreparedData
    from engine.runtime.mcore import Groups

_STARTED = time.monotonic()
_DISTRIBUTED_TIMEOUT_MINUTES = 60
REPORTERS = ("tensorboard", "none")


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A run whose settings fit each other and the model."""

    config: SftConfig
    spec: ModelSpec
    layout: ParallelLayout
    shape: BatchShape
    model_dir: Path
    output_dir: Path
    resume: Path | None

    def summary(self) -> str:
        """The model and how ranks are laid out."""
        spec = self.spec
        return "\n".join(
            [
                f"model: {self.model_dir} ({spec.architecture}, {spec.num_parameters() / 1e6:,.1f} M "
                f"parameters, {spec.num_layers} layers)",
                f"layout: {self.layout.summary()}",
                self.layout.grid(),
            ]
        )


def sft(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what is wrong before any rank is started."""
    if "--help" in argv or "-h" in argv:
        print("usage: braid sft [--config FILE.yaml] [--flag value ...]\n" + help_text(SftConfig))
        return 0
    config, _ = parse(SftConfig, argv, launch_environment())
    world = find_world(config.launch)
    # args.yaml records the processes that really run, whoever started them.
    config.launch.nproc_per_node, config.launch.nnodes = world.local_size, world.size // world.local_size
    if config.run.dry_run:
        return _dry_run(draw(config, world)) if world.rank == 0 else 0
    if world.started or world.size == 1:
        place: list[str] = []
        return run_worker(world, lambda: _worker(config, world, place), lambda: place[0] if place else "")
    check_files(draw(config, world))
    return start_processes(config.launch, world, ["sft", *argv])


def draw(config: SftConfig, world: World) -> Blueprint:
    """Check all settings against each other and the model. Raises UserError; imports neither torch nor
    Megatron.
    """
    from engine.data.prepare import check_options
    from engine.training.resume import TrainerState, resolve_resume

    run, options = config.run, config.model
    if options.model is None:
        raise ConfigError("no model given; pass --model DIR")
    if run.output_dir is None:
        raise ConfigError("no output directory given; pass --output_dir DIR")
    _refuse_unbuilt(config)
    _check_ranges(config)
    check_options(config.data)
    spec = load_model_spec(options.model)
    layout = ParallelLayout.resolve(config.parallel, num_layers=spec.num_layers, world_size=world.size)
    spec.check_tensor_parallel(layout.tp)
    output_dir = Path(run.output_dir)
    resume = resolve_resume(run.resume_from_checkpoint, output_dir)
    shape = resolve_batch_shape(
        config.batch,
        data_parallel_size=layout.dp,
        resumed_global_batch_size=TrainerState.read(resume).global_batch_size if resume else None,
    )
    layout.check_micro_batches(shape.accumulation)
    return Blueprint(
        config=config,
        spec=spec,
        layout=layout,
        shape=shape,
        model_dir=Path(options.model),
        output_dir=output_dir,
        resume=resume,
    )


def _refuse_unbuilt(config: SftConfig) -> None:
    if config.model.train_type != "full":
        raise ConfigError("train_type lora is not available in this version; use --train_type full")
    if config.run.async_save:
        raise ConfigError("async_save is not available in this version; leave it out")
    unknown = [name for name in config.run.report_to if name not in REPORTERS]
    if unknown:
        raise ConfigError(f"report_to {unknown[0]!r} is not available; choose from {', '.join(REPORTERS)}")


def _check_ranges(config: SftConfig) -> None:
    values = flatten(config)
    for name in ("logging_steps", "save_steps", "eval_steps", "save_total_limit", "max_steps"):
        if values[name] is not None and values[name] < 1:
            raise ConfigError(f"{name} must be at least 1, not {values[name]}")
    for name in ("learning_rate", "min_lr", "weight_decay", "max_grad_norm"):
        if values[name] < 0:
            raise ConfigError(f"{name} must not be negative, not {values[name]}")
    for name in ("num_train_epochs", "adam_epsilon"):
        if values[name] <= 0:
            raise ConfigError(f"{name} must be positive, not {values[name]}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= values[name] < 1:
            raise ConfigError(f"{name} must be in [0, 1), not {values[name]}")
    if not 0 <= values["warmup_ratio"] <= 1:
        raise ConfigError(f"warmup_ratio must be in [0, 1], not {values['warmup_ratio']}")
    if not 0 <= values["seed"] < 2**32:
        raise ConfigError(f"seed must be in [0, 2**32), not {values['seed']}")


def check_files(blueprint: Blueprint) -> None:
    """Check what lies on disk before any rank starts or anything is written. Of weights only the headers are
    read.
    """
    check_output_dir(blueprint)
    options = blueprint.config.model
    in_fp32 = options.torch_dtype == "float32" or (options.torch_dtype is None and options.device != "cuda")
    check_room(
        blueprint.output_dir, num_parameters=blueprint.spec.num_parameters(), weight_bytes=4 if in_fp32 else 2
    )
    if blueprint.resume is not None:
        _check_checkpoint(blueprint.resume, blueprint.spec)
    else:
        from converters.hf_files import HfReader, check_weights
        from converters.mapping import weight_map

        check_weights(HfReader(blueprint.model_dir), weight_map(blueprint.spec))


def _check_checkpoint(checkpoint: Path, spec: ModelSpec) -> None:
    """Raise CheckpointError if it is of another model, or one of its files is missing or cut off."""
    from converters.dist_ckpt import DistReader, check_checkpoint
    from converters.files import inside
    from converters.mapping import weight_map

    reader = DistReader(checkpoint)
    check_checkpoint(reader, weight_map(spec))
    ends: dict[str, int] = {}
    for chunk in (chunk for tensor in reader.tensors.values() for chunk in tensor.chunks):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    for file, end in ends.items():
        path = inside(checkpoint, file, error=CheckpointError)
        size = path.stat().st_size
        if size < end:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes of {end}; resume from another checkpoint"
            )


def check_output_dir(blueprint: Blueprint) -> None:
    """Raise OutputError if another run's files would be mixed with this one's, or nothing can be written."""
    directory = blueprint.output_dir
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"output_dir {directory} is a file; choose a directory")
    # `auto` starts afresh in a directory of a run that left no checkpoint, but not among foreign files.
    auto = blueprint.config.run.resume_from_checkpoint is not None and (directory / "args.yaml").is_file()
    if blueprint.resume is None and not auto and directory.is_dir() and any(directory.iterdir()):
        raise OutputError(
            f"output_dir {directory} is in use; choose another, empty it, or pass --resume_from_checkpoint "
            f"auto"
        )
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise OutputError(f"output_dir {directory} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output_dir {directory} cannot be written: no permission in {parent}")


def plan_batches(blueprint: Blueprint, num_rows: int) -> "BatchPlan":
    """How the rows of the training set become steps under the run's layout."""
    from engine.data.batches import BatchPlan

    batch = blueprint.config.batch
    return BatchPlan(
        num_rows=num_rows,
        global_batch_size=blueprint.shape.global_batch_size,
        micro_batch_size=blueprint.shape.micro_batch_size,
        data_parallel_size=blueprint.layout.dp,
        accumulation=blueprint.shape.accumulation,
        num_train_epochs=batch.num_train_epochs,
        max_steps=batch.max_steps,
        seed=blueprint.config.run.seed,
    )


def _dry_run(blueprint: Blueprint) -> int:
    import yaml

    from engine.data.prepare import prepare

    check_files(blueprint)
    data = prepare(blueprint.config.data, blueprint.model_dir, seed=blueprint.config.run.seed)
    data.check_vocabulary(blueprint.spec.vocab_size)
    print(yaml.safe_dump(flatten(blueprint.config), sort_keys=False, allow_unicode=True), end="")
    print(blueprint.summary())
    print(data.summary())
    print(plan_batches(blueprint, len(data.train)).describe())
    return 0


def _worker(config: SftConfig, world: World, place: list[str]) -> None:
    """One rank's whole run. `place` receives the rank's grid coordinates once they are known, for error
    messages.
    """
    blueprint = draw(config, world)
    open_world(world)
    if world.rank == 0:
        check_files(blueprint)
    from engine.runtime.platform import open_platform

    options = config.model
    platform = open_platform(
        device=options.device,
        dtype=options.torch_dtype,
        transformer_impl=options.transformer_impl,
        local_rank=world.local_rank,
    )
    data = prepare_here(blueprint, world)
    from datetime import timedelta

    import torch.distributed as dist

    from engine.runtime import mcore

    # A process of its own has nobody to meet, so it needs neither an address nor a port.
    alone: dict[str, Any] = {} if world.started else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    timeout = timedelta(minutes=_DISTRIBUTED_TIMEOUT_MINUTES)
    dist.init_process_group(platform.backend, timeout=timeout, **alone)
    place.append(str(blueprint.layout.place(world.rank)))
    groups = mcore.initialize(
        blueprint.layout, platform, seed=config.run.seed, deterministic=config.run.deterministic
    )
    data = share_data(data, blueprint)
    with full_disk_named(blueprint.output_dir):
        last = train(blueprint, platform, groups, data)
        if world.rank == 0:
            _export(last, blueprint, data)
    dist.barrier()
    mcore.destroy()
    dist.destroy_process_group()


def prepare_here(blueprint: Blueprint, world: World) -> "PreparedData | None":
    """Tokenise on one process of each node; the others import Megatron meanwhile and read the cache
    afterwards.
    """
    if world.local_rank != 0:
        return None
    from engine.data.prepare import prepare

    data = prepare(blueprint.config.data, blueprint.model_dir, seed=blueprint.config.run.seed)
    data.check_vocabulary(blueprint.spec.vocab_size)
    return data


def share_data(data: "PreparedData | None", blueprint: Blueprint) -> "PreparedData":
    import torch.distributed as dist

    from engine.data.prepare import open_prepared, prepare

    fingerprints = [data.fingerprints() if data is not None else None]
    dist.broadcast_object_list(fingerprints, src=0)
    if data is None:
        # Without a cache directory that can be written, every process tokenises for itself.
        data = open_prepared(fingerprints[0] or [])
        data = data or prepare(blueprint.config.data, blueprint.model_dir, seed=blueprint.config.run.seed)
    return data


def train(blueprint: Blueprint, platform: Any, groups: "Groups", data: "PreparedData") -> Path:
    """Put the run together and train; returns the last checkpoint."""
    from converters.companions import write_companions
    from converters.load import load_model_weights
    from engine.data.batches import evaluation_plan
    from engine.data.loader import Loader
    from engine.data.prepare import PAD_ID
    from engine.model.provider import build_chunks
    from engine.training.loop import Trainer
    from engine.training.optimizer import build_optimizer, wrap_data_parallel
    from engine.training.schedule import LearningRate

    config, spec, layout = blueprint.config, blueprint.spec, blueprint.layout
    plan = plan_batches(blueprint, len(data.train))
    if groups.rank == 0:
        _announce(blueprint, data, plan)
    chunks = build_chunks(spec, layout, platform, config.recompute, groups)
    if blueprint.resume is None:
        load_model_weights(chunks, blueprint.model_dir, spec, groups)
    models = wrap_data_parallel(chunks, config.optimizer, groups)
    optimizer = build_optimizer(models, config.optimizer, groups, platform.dtype)

    def loader(store: Any, its_plan: "BatchPlan") -> Loader:
        return Loader(
            store=store,
            plan=its_plan,
            dp_rank=groups.dp_rank,
            pad_id=PAD_ID,
            pad_to_multiple_of=layout.tp,
            num_workers=config.data.dataloader_num_workers,
        )

    eval_data = None
    if data.evaluation is not None:
        eval_plan = evaluation_plan(
            len(data.evaluation),
            micro_batch_size=config.batch.per_device_eval_batch_size,
            data_parallel_size=layout.dp,
            micro_batches_multiple_of=layout.pp if layout.vpp > 1 else 1,
        )
        eval_data = loader(data.evaluation, eval_plan)
    trainer = Trainer(
        config=config,
        spec=spec,
        platform=platform,
        groups=groups,
        models=models,
        optimizer=optimizer,
        schedule=LearningRate.from_options(config.optimizer, plan.total_steps),
        train_data=loader(data.train, plan),
        eval_data=eval_data,
        output_dir=blueprint.output_dir,
        add_companions=lambda directory: write_companions(blueprint.model_dir, directory),
        started=_STARTED,
    )
    return trainer.fit(blueprint.resume)


def _announce(blueprint: Blueprint, data: "PreparedData", plan: "BatchPlan") -> None:
    from launch.record import write_args

    blueprint.output_dir.mkdir(parents=True, exist_ok=True)
    write_args(blueprint.output_dir / "args.yaml", flatten(blueprint.config))
    print(blueprint.summary())
    print(data.summary())
    print(plan.describe())
    asked = blueprint.config.batch.gradient_accumulation_steps
    if blueprint.resume is not None:
        print(f"resuming from {blueprint.resume}")
        if asked is not None and asked != blueprint.shape.accumulation:
            print(
                f"gradient_accumulation_steps {asked} becomes {blueprint.shape.accumulation}: the run keeps "
                f"its global batch of {blueprint.shape.global_batch_size} rows"
            )


def _export(checkpoint: Path, blueprint: Blueprint, data: "PreparedData") -> None:
    """Write `hf/`, and the card and curve that describe it."""
    import shutil

    from converters.convert import to_hf
    from launch.card import write_card

    target = blueprint.output_dir / "hf"
    # An earlier export of a resumed run is replaced, never mixed.
    shutil.rmtree(target, ignore_errors=True)
    report = to_hf(checkpoint, target)
    print(f"exported {report.tensors} tensors, {report.bytes / 2**30:.2f} GiB, to {target}", flush=True)
    write_card(
        blueprint.output_dir,
        flatten(blueprint.config),
        layout=blueprint.layout.summary(),
        data=data.summary(),
        global_batch_size=blueprint.shape.global_batch_size,
    )
