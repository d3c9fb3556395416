"""`braid validate`: the layouts of this machine against one GPU, in one report. Imports neither torch nor
Megatron.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from engine.config.parse import flatten, help_text, parse
from engine.errors import ConfigError
from launch.bench.output import write_json
from launch.bench.paper import check_outputs
from launch.gpu import count_visible
from launch.processes import find_world, launch_environment, run_worker, start_processes
from launch.validate.options import Bounds, SpeedOptions, ValidateConfig, check
from launch.validate.tasks import Setup

USAGE = """usage: braid validate --output_dir DIR [--flag value ...]

Compares every layout that this machine's GPUs allow with one GPU, on small random models, and measures their
speed. Leaves report.json, report.md and report.png in DIR; exit code 0: every layout passed, 1: not.
"""
_OPTIONS = "options.json"
# What a later call with --resume may change: results do not depend on it.
_FREE = ("output_dir", "parts", "layouts", "resume", "part_timeout", "task_timeout", *vars(Bounds()))


def validate(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what is wrong before anything is started."""
    if "--help" in argv or "-h" in argv:
        print(USAGE + help_text(ValidateConfig))
        return 0
    if argv[:1] == ["crew"]:  # the processes that the command starts
        return _crew(argv[1])
    config, _ = parse(ValidateConfig, argv, launch_environment())
    check(config)
    world = find_world(config.launch, "validate")
    if world.started:
        raise ConfigError("validate starts processes itself; run it once, not under torchrun or srun")
    ranks, on_cpu = _machine(config)
    setup = Setup(config=config, ranks=ranks, on_cpu=on_cpu)
    assert setup.layouts  # or ConfigError
    if "speed" in config.validate.parts:
        _check_speed(setup)
    _claim(config, setup.root, ranks)
    return _run(setup)


def _machine(config: ValidateConfig) -> tuple[int, bool]:
    """Number of processes, and whether they are of the CPU. Raises ConfigError."""
    device, asked = config.validate.device, config.launch.nproc_per_node
    cards = 0 if device == "cpu" else count_visible()
    if device != "cpu" and cards == 0:
        raise ConfigError(
            "no GPU is visible; pass --device cpu with NPROC_PER_NODE to try the program itself"
        )
    if asked is None and device == "cpu":
        raise ConfigError("--device cpu needs the number of processes; set NPROC_PER_NODE")
    if device != "cpu" and (asked or cards) > cards:
        raise ConfigError(f"{asked} processes need as many GPUs, {cards} are visible; lower NPROC_PER_NODE")
    return asked or cards, device == "cpu"


def _check_speed(setup: Setup) -> None:
    """Raise ConfigError for a shape or an option that `braid bench train` does not know."""
    from launch.validate import speed

    shape = setup.config.speed.shape
    if setup.on_cpu and shape == SpeedOptions().shape:
        raise ConfigError(f"shape {shape} is too large for a CPU; pass --shape tiny")
    speed.tasks(setup)


def _claim(config: ValidateConfig, root: Path, ranks: int) -> None:
    """Take the output directory, for the first time or to go on. Raises ConfigError, or OutputError."""
    kept = {name: value for name, value in flatten(config).items() if name not in _FREE}
    kept["nproc_per_node"] = ranks
    if not config.validate.resume:
        check_outputs(str(root))
    elif (root / _OPTIONS).is_file():
        before = json.loads((root / _OPTIONS).read_text(encoding="utf-8"))
        for name, value in kept.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{name} was {before.get(name)} in the results of {root}, now {value}; leave it as it "
                    f"was, or choose another output_dir"
                )
    write_json(root / _OPTIONS, kept)


def _run(setup: Setup) -> int:
    from launch.bench.sweep import ending_on_sigterm
    from launch.validate.conductor import conduct
    from launch.validate.doctor import examine
    from launch.validate.report import write_report

    try:
        with ending_on_sigterm():
            if "doctor" in setup.config.validate.parts:
                examine(setup)
            conduct(setup)
    finally:
        # A call that is ended leaves a report of what it has.
        code = write_report(setup)
    return code


def _crew(path: str) -> int:
    """Be a rank of a crew, or start them."""
    began = time.monotonic()
    config, _ = parse(ValidateConfig, [], launch_environment())
    world = find_world(config.launch, "validate")
    if not world.started:
        return start_processes(config.launch, world, ["validate", "crew", path], began=began)

    def work() -> None:
        from launch.validate.conductor import read_orders
        from launch.validate.crew import serve

        serve(world, *read_orders(Path(path)))

    return run_worker(world, work, lambda: "")
