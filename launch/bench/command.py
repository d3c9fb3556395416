"""`braid bench`: what it measures, and the start of its ranks. Imports neither torch nor Megatron."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.config.adopt import settle_strategy
from engine.config.bench import CommBenchConfig, SweepBenchConfig, TrainBenchConfig
from engine.config.parse import help_text, parse
from engine.errors import ConfigError
from launch.bench.dry import dry_comm, dry_sweep, dry_train
from launch.bench.paper import check_outputs, draw_bench
from launch.processes import World, find_world, launch_environment, run_worker, start_processes

if TYPE_CHECKING:
    from engine.config.options import LaunchOptions

USAGE = """usage: braid bench COMMAND [--config FILE.yaml] [--flag value ...]

commands:
  train   steps of training on random weights and rows: tokens/s, MFU, memory, where the time goes
  comm    bandwidth of every process group of a layout, by operation and size
  sweep   `train` with every layout that fits the processes, the best first

braid bench COMMAND --help lists a command's flags. It is started like braid sft: NPROC_PER_NODE=8 braid bench
train --shape qwen2.5-7b --tensor_model_parallel_size 2"""

_CONFIGS: dict[str, type[Any]] = {
    "train": TrainBenchConfig,
    "comm": CommBenchConfig,
    "sweep": SweepBenchConfig,
}


def bench(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what is wrong before any rank is started."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in _CONFIGS:
        raise ConfigError(f"unknown benchmark {name!r}; benchmarks are {', '.join(_CONFIGS)}")
    if "--help" in rest or "-h" in rest:
        print(
            f"usage: braid bench {name} [--config FILE.yaml] [--flag value ...]\n{help_text(_CONFIGS[name])}"
        )
        return 0
    config, given = parse(_CONFIGS[name], rest, launch_environment())
    if name != "comm":
        settle_strategy(config.optimizer, given)
    world = find_world(config.launch, "bench")
    if name == "train":
        return _train(config, world, argv)
    if name == "comm":
        return _comm(config, world, argv)
    return _sweep(config, world, argv)


def _train(config: TrainBenchConfig, world: World, argv: Sequence[str]) -> int:
    def check() -> None:
        draw_bench(config, world)
        check_outputs(config.bench.output_dir, config.bench.trace)

    if config.bench.dry_run:
        return _dry(world, check, lambda: dry_train(config, world))

    def work(place: list[str]) -> None:
        from launch.bench.train import run

        run(config, world, place)

    return _start(config.launch, world, argv, check, work)


def _comm(config: CommBenchConfig, world: World, argv: Sequence[str]) -> int:
    from launch.bench.comm import draw_comm, run

    def check() -> None:
        draw_comm(config, world)
        check_outputs(config.comm.output_dir)

    if config.comm.dry_run:
        return _dry(world, check, lambda: dry_comm(config, world))
    return _start(config.launch, world, argv, check, lambda place: run(config, world, place))


def _sweep(config: SweepBenchConfig, world: World, argv: Sequence[str]) -> int:
    from launch.bench.sweep import run

    if config.bench.dry_run:
        dry_sweep(config, world)
        return 0
    return run(config, world)


def _dry(world: World, check: Callable[[], None], show: Callable[[], None]) -> int:
    """One process, whoever started it, checks and shows."""
    if world.rank == 0:
        check()
        show()
    return 0


def _start(
    launch: "LaunchOptions",
    world: World,
    argv: Sequence[str],
    check: Callable[[], None],
    work: Callable[[list[str]], None],
) -> int:
    """Be the rank that this process is, or start the ranks after `check`. `work` gets a list to put the
    rank's place in, for messages.
    """
    began = time.monotonic()
    if world.started or world.size == 1:
        place: list[str] = []
        return run_worker(world, lambda: work(place), lambda: place[0] if place else "")
    check()
    return start_processes(launch, world, ["bench", *argv], began=began)
