"""`braid sft`: check what can be checked, start the ranks, and on each of them put the run together."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.adopt import adopt
from engine.config.adoption import Adoption
from engine.config.options import SftConfig
from engine.config.parse import flatten, help_text, parse
from engine.errors import CheckpointError, ConfigError, OutputError
from engine.training.startup import Startup
from launch.batching import describe, evaluation_loader, training_loader
from launch.blueprint import Blueprint, check_files, draw
from launch.disk import full_disk_named
from launch.memory import describe_memory
from launch.processes import (
    World,
    attempt_began,
    environment_of_one,
    find_world,
    give_up,
    launch_environment,
    meeting_place,
    open_world,
    restart_count,
    run_worker,
    start_processes,
    stop_signals,
)
from launch.record import options_text, write_args

if TYPE_CHECKING:
    from engine.data.loader import Loader
    from engine.data.prepare import PreparedData
    from engine.data.stream import StreamLoader
    from engine.model.gpt import BraidGPTModel
    from engine.runtime.mcore import Groups
    from engine.runtime.platform import Platform
    from engine.training.watch import StopRequest

_DISTRIBUTED_TIMEOUT_MINUTES = 60


def sft(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what is wrong before any rank is started."""
    if "--help" in argv or "-h" in argv:
        print("usage: braid sft [--config FILE.yaml] [--flag value ...]\n" + help_text(SftConfig))
        return 0
    began = time.monotonic()
    config, given = parse(SftConfig, argv, launch_environment())
    adopted = adopt(config, given)
    world = find_world(config.launch)
    if config.launch.max_restarts < 0:
        raise ConfigError(f"max_restarts must not be negative, not {config.launch.max_restarts}")
    # args.yaml records the processes that really run, whoever started them.
    config.launch.nproc_per_node, config.launch.nnodes = world.local_size, world.size // world.local_size
    if config.run.dry_run:
        alone = replace(world, started=False)  # nobody is told what it finds
        return _dry_run(draw(config, alone, adopted=adopted)) if world.rank == 0 else 0
    if world.started or world.size == 1:
        place: list[str] = []
        work = partial(_worker, config, adopted, world, place)
        return run_worker(world, work, lambda: place[0] if place else "")
    blueprint = draw(config, world, adopted=adopted)
    check_files(blueprint)
    models = {str(config.model.model): str(blueprint.model_dir)}
    return start_processes(config.launch, world, ["sft", *argv], began=began, models=models)


def _dry_run(blueprint: Blueprint) -> int:

    from engine.data.prepare import prepare

    check_files(blueprint)
    data = prepare(blueprint.config.data, blueprint.model_dir, seed=blueprint.config.run.seed)
    data.check_vocabulary(blueprint.spec.vocab_size)
    print(options_text(flatten(blueprint.config)), end="")
    print(blueprint.summary())
    print(describe_memory(blueprint))
    if summary := data.summary():
        print(summary)
    print(describe(training_loader(blueprint, data, dp_rank=0)))
    return 0


def _worker(config: SftConfig, adopted: Adoption | None, world: World, place: list[str]) -> None:
    """One rank's whole run. `place` receives the rank's grid coordinates once they are known, for error
    messages.
    """
    startup = Startup(attempt_began())
    startup.mark("launch")
    open_world(world)
    blueprint = draw(config, world, adopted=adopted)
    if world.rank == 0:
        check_files(blueprint)
    from engine.runtime.platform import open_platform_of

    platform = open_platform_of(config.model, world.local_rank)
    startup.mark("imports")
    data = prepare_here(blueprint, world)
    startup.mark("data")
    from engine.runtime import mcore

    mcore.adapt_megatron(platform)  # imports Megatron, so that its seconds are not counted as process groups
    from engine.training.watch import StopRequest

    startup.mark("imports")
    join_ranks(world, platform)
    place.append(str(blueprint.layout.place(world.rank)))
    groups = mcore.initialize(
        blueprint.layout, platform, seed=config.run.seed, deterministic=config.run.deterministic
    )
    startup.mark("process groups")
    blueprint = settle_resume(blueprint, world)
    startup.mark("checkpoint")
    data = share_data(data, blueprint)
    startup.mark("data")
    stop = StopRequest(stop_signals())
    # Until the end: what is asked of a run that has trained, and exports, is what it does already.
    with full_disk_named(blueprint.output_dir), stop.listening():
        hung = partial(give_up, world, place[0])
        last = train(blueprint, platform, groups, data, hung, stop, startup)
        if world.rank == 0:
            _export(last, blueprint, data)
        leave_ranks()


def join_ranks(world: World, platform: "Platform") -> None:
    """Open torch's default group over all ranks."""
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group(
        platform.backend,
        store=meeting_place(world),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(minutes=_DISTRIBUTED_TIMEOUT_MINUTES),
    )


def leave_ranks() -> None:
    """Wait for all ranks, and close Megatron's groups and torch's."""
    import torch.distributed as dist

    from engine.runtime import mcore

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

    fingerprints: list[Any] = [data.fingerprints() if data is not None else None]
    dist.broadcast_object_list(fingerprints, src=0)
    if data is None:
        # Without a cache directory that can be written, every process tokenises for itself.
        data = open_prepared(fingerprints[0])
        data = data or prepare(blueprint.config.data, blueprint.model_dir, seed=blueprint.config.run.seed)
    return data


def train(
    blueprint: Blueprint,
    platform: Any,
    groups: "Groups",
    data: "PreparedData",
    hung: Callable[[str], None],
    stop: "StopRequest",
    startup: Startup | None = None,
) -> Path:
    """Put the run together and train; returns the last checkpoint. `hung` ends a process that is stuck,
    `stop` is the request to end.
    """
    from engine.data.stream import StreamLoader
    from engine.model.provider import attention_name, build_chunks
    from engine.training.loop import Trainer
    from engine.training.optimizer import build_optimizer, wrap_data_parallel
    from engine.training.schedule import LearningRate

    config, spec, layout, lora = blueprint.config, blueprint.spec, blueprint.layout, blueprint.lora
    train_data = training_loader(blueprint, data, dp_rank=groups.dp_rank)
    if groups.rank == 0:
        _announce(blueprint, data, train_data)
        print(f"attention: {attention_name(platform, layout, spec.head_dim)}")
    chunks = build_chunks(spec, layout, platform, config.recompute, groups, lora, config.moe)
    load_weights(chunks, blueprint, groups)
    models = wrap_data_parallel(chunks, config.optimizer, groups)
    optimizer = build_optimizer(models, config.optimizer, groups, platform.dtype)
    if startup is not None:
        startup.mark("model")
    trainer = Trainer(
        config=config,
        flops_per_token=partial(
            spec.train_flops_per_token,
            adapter_parameters=lora.num_parameters(spec, active=True) if lora else None,
        ),
        platform=platform,
        groups=groups,
        models=models,
        optimizer=optimizer,
        schedule=LearningRate.from_options(config.optimizer, train_data.plan.total_steps),
        train_data=train_data,
        eval_data=evaluation_loader(blueprint, data, dp_rank=groups.dp_rank),
        output_dir=blueprint.output_dir,
        add_companions=_companions(blueprint),
        started=blueprint.started,
        startup=startup,
        give_up=hung,
        stop=stop,
        export=partial(export_beside, blueprint.output_dir, blueprint.lora is not None),
    )
    last = trainer.fit(blueprint.resume)
    if groups.rank == 0 and isinstance(train_data, StreamLoader):
        print(train_data.report.line("streamed"))
    return last


def load_weights(chunks: Sequence["BraidGPTModel"], blueprint: Blueprint, groups: "Groups") -> None:
    """What the chunks start from, as far as no checkpoint brings it."""
    from converters.adapter import open_adapter
    from converters.load import load_adapter_weights, load_model_weights
    from engine.model.lora import initialize_adapters

    fresh, lora, spec = blueprint.resume is None, blueprint.lora, blueprint.spec
    if fresh or lora is not None:
        load_model_weights(chunks, blueprint.model_dir, spec, groups)
    if fresh and lora is not None:
        adapter_dir = blueprint.config.lora.adapter
        if adapter_dir is not None:
            load_adapter_weights(chunks, open_adapter(adapter_dir, spec), groups)
        else:
            initialize_adapters(chunks, seed=blueprint.config.run.seed, groups=groups)


def _companions(blueprint: Blueprint) -> Callable[[Path], Any]:
    """Adds to a checkpoint what its export needs."""
    from converters.adapter import new_adapter_config, open_adapter, write_adapter_companions
    from converters.mcore.companions import write_companions

    model_dir, lora = blueprint.model_dir, blueprint.lora
    if lora is None:
        return lambda directory: write_companions(model_dir, directory)
    import torch

    config, dtype = new_adapter_config(lora, str(blueprint.config.model.model), blueprint.spec), torch.float32
    if blueprint.config.lora.adapter is not None:
        adapter = open_adapter(blueprint.config.lora.adapter, blueprint.spec)
        config, dtype = adapter.config(), adapter.dtype()
    return lambda directory: write_adapter_companions(model_dir, directory, config=config, dtype=dtype)


def settle_resume(blueprint: Blueprint, world: World) -> Blueprint:
    """The blueprint with a checkpoint whose every byte is what was written, if it resumes.

    Ranks share the reading. `auto` passes over a damaged checkpoint, and says so; one that was asked for by
    its path is refused.
    """
    import torch.distributed as dist

    from engine.storage.manifest import check_share
    from engine.training.resume import passed_over

    if world.rank == 0:
        for line in passed_over(blueprint.output_dir, blueprint.resume):
            print(f"{line}; passing it over", flush=True)
    damaged: list[Path] = []
    while blueprint.resume is not None:
        found: list[str | None] = [None] * world.size
        problem = check_share(blueprint.resume, world.rank, world.size)
        dist.all_gather_object(found, problem)
        wrong = next((line for line in found if line is not None), None)
        if wrong is None:
            return blueprint
        if blueprint.config.run.resume_from_checkpoint != "auto" and restart_count() == 0:
            raise CheckpointError(f"{wrong}; resume from another checkpoint or pass `auto`")
        if world.rank == 0:
            print(f"{wrong}; passing {blueprint.resume.name} over", flush=True)
        damaged.append(blueprint.resume)
        blueprint = draw(blueprint.config, world, damaged=damaged, adopted=blueprint.adopted)
    return blueprint


def export_beside(output_dir: Path, lora: bool, checkpoint: Path) -> None:
    """Export a checkpoint as `hf-<step>` or `adapter-<step>`, in a process of its own so that training does
    not wait for the interpreter.
    """
    step = checkpoint.name.removeprefix("checkpoint-")
    target = output_dir / f"{'adapter' if lora else 'hf'}-{step}"
    shutil.rmtree(target, ignore_errors=True)
    words = ["convert", "--to", "hf", "--checkpoint", str(checkpoint), "--output_dir", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words, "--workers", "1"],
        env=environment_of_one(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OutputError(f"export of {checkpoint.name} failed: {done.stderr.strip().splitlines()[-1]}")
    print(f"exported {target}", flush=True)


def _announce(blueprint: Blueprint, data: "PreparedData", train_data: "Loader | StreamLoader") -> None:
    blueprint.output_dir.mkdir(parents=True, exist_ok=True)
    write_args(blueprint.output_dir / "args.yaml", flatten(blueprint.config))
    print(blueprint.summary())
    if summary := data.summary():
        print(summary)
    print(describe(train_data))
    asked = blueprint.config.batch.gradient_accumulation_steps
    if blueprint.resume is not None:
        print(f"resuming from {blueprint.resume}")
        if asked is not None and asked != blueprint.shape.accumulation:
            print(
                f"gradient_accumulation_steps {asked} becomes {blueprint.shape.accumulation}: the run keeps "
                f"its global batch of {blueprint.shape.global_batch_size} {train_data.plan.unit}"
            )


def _export(checkpoint: Path, blueprint: Blueprint, data: "PreparedData") -> None:
    """Write `hf/` or `adapter/`, and the card and curve that describe it."""
    from converters.adapter import to_peft
    from converters.convert import to_hf
    from launch.card import write_card

    target = blueprint.output_dir / ("hf" if blueprint.lora is None else "adapter")
    # An earlier export of a resumed run is replaced, never mixed.
    shutil.rmtree(target, ignore_errors=True)
    report = (to_hf if blueprint.lora is None else to_peft)(checkpoint, target)
    print(f"exported {report.tensors} tensors, {report.bytes / 2**30:.2f} GiB, to {target}", flush=True)
    write_card(
        blueprint.output_dir,
        flatten(blueprint.config),
        layout=blueprint.layout.summary(),
        data=data.summary() or f"streamed from {', '.join(blueprint.config.data.dataset)}",
        global_batch_size=blueprint.shape.global_batch_size,
    )
