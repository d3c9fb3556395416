"""`braid bench ... --dry_run`: what would be measured, without a rank or a GPU, and nothing is written."""

from typing import TYPE_CHECKING

from engine.config.bench import CommBenchConfig, SweepBenchConfig, TrainBenchConfig
from engine.config.parse import flatten
from launch.bench.paper import draw_bench, total_steps
from launch.gpu import visible_card
from launch.processes import World
from launch.record import options_text

if TYPE_CHECKING:
    from engine.config.parallel import ParallelLayout


def dry_train(config: TrainBenchConfig, world: World) -> None:
    """Print options, ranks, memory, packs and steps of `braid bench train`. Raises UserError."""
    from engine.data.prepare import PreparedData
    from launch.batching import describe, training_loader
    from launch.bench.data import random_store
    from launch.memory import describe_memory

    blueprint, bench = draw_bench(config, world), config.bench
    sequences = total_steps(config) * blueprint.shape.global_batch_size
    store = random_store(bench, sequences=sequences, vocab_size=blueprint.spec.vocab_size)
    loader = training_loader(blueprint, PreparedData(train=store, evaluation=None), dp_rank=0)
    print(options_text(flatten(config)), end="")
    print(f"{blueprint.summary()}\n{describe_memory(blueprint)}\n{describe(loader)}")
    rest = total_steps(config) - bench.warmup_steps - bench.steps
    print(f"{bench.warmup_steps} steps of warm-up, {bench.steps} measured, {rest} under timers or traced")


def dry_comm(config: CommBenchConfig, world: World) -> None:
    """Print ranks, process groups and messages of `braid bench comm`. Raises UserError."""
    from engine.config.options import ModelOptions
    from launch.bench.comm import ITERATIONS, SIZES, draw_comm, parse_sizes, size_name

    layout, options = draw_comm(config, world), config.comm
    card = visible_card(ModelOptions(device=options.device))
    on_cpu = options.device == "cpu" or (options.device == "auto" and card is None)
    sizes = parse_sizes(options.sizes) or SIZES[on_cpu]
    groups = ", ".join(f"{name} ({ranks})" for name, ranks in group_sizes(layout).items())
    print(options_text(flatten(config)), end="")
    print(f"layout: {layout.summary()}\n{layout.grid()}")
    print(f"groups (ranks): {groups}, over {'gloo' if on_cpu else 'nccl'}")
    print(f"messages: {', '.join(size_name(size) for size in sizes)}")
    print(f"{options.iterations or ITERATIONS[on_cpu]} timed calls of each operation, size and group")
    # The buffer, another of its size, and a rank's share.
    largest = max(sizes) * (2 + 1 / min(group_sizes(layout).values()))
    print(f"buffers of a rank: {size_name(int(largest))} at most")


def group_sizes(layout: "ParallelLayout") -> dict[str, int]:
    """Ranks of the groups of more than one rank, by the names of `process_groups`."""
    found = {
        "tp": layout.tp,
        "cp": layout.cp,
        "dp_cp": layout.dp * layout.cp,
        "ep": layout.ep,
        "pp": layout.pp,
        "world": layout.world_size,
    }
    return {name: ranks for name, ranks in found.items() if ranks > 1}


def dry_sweep(config: SweepBenchConfig, world: World) -> None:
    """Print the cases that `braid bench sweep` would try, with the memory of each. Raises UserError."""
    from launch.bench.output import Table
    from launch.bench.sweep import check_sweep, draw_sweep, train_config
    from launch.memory import GIB, peak, workload

    check_sweep(config, world)
    candidates, refused = draw_sweep(config, world)
    print(options_text(flatten(config)), end="")
    rows, dtype = [], ""
    for candidate in candidates:
        blueprint = draw_bench(train_config(config, candidate), world)
        layout, shape, dtype = blueprint.layout, blueprint.shape, workload(blueprint).dtype
        degrees = (layout.tp, layout.pp, layout.cp, layout.ep, layout.dp)
        batch = (shape.micro_batch_size, shape.accumulation)
        memory = f"{peak(blueprint) / GIB:.1f}"
        rows.append([candidate.name, *map(str, (*degrees, *batch)), candidate.recompute, memory])
    columns = ("case", "TP", "PP", "CP", "EP", "DP", "micro-batch", "micro-batches", "recompute", "GiB")
    title = (
        f"{len(rows)} cases on {world.size} processes, global batch {config.batch.global_batch_size}; GiB: "
        f"estimated for a rank on a GPU in {dtype}"
    )
    Table(title=title, columns=columns, rows=rows).show()
    print(f"{len(refused)} combinations do not fit")
    for name, reason in refused.items():
        print(f"  {name}: {reason}")
