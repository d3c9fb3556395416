"""Part comm: how fast the process groups of the layouts exchange, by `braid bench comm`."""

from typing import Any

from engine.config.parallel import ParallelLayout
from launch.bench.comm import size_name
from launch.bench.dry import group_sizes
from launch.bench.output import Table
from launch.processes import World
from launch.validate.tasks import Setup, Task
from launch.validate.verdict import PartReport, missing, outcome

_SIZES = {False: ["1MiB", "16MiB", "256MiB"], True: ["64KiB", "1MiB"]}
"""By whether the device is a CPU."""


def tasks(setup: Setup) -> list[Task]:
    """Layouts that have kinds of groups which none before them has, and which those are."""
    found: list[Task] = []
    seen: set[tuple[str, int]] = set()
    for layout in setup.layouts:
        stages = ParallelLayout.resolve(
            layout.parallel(), num_layers=layout.pp * layout.vpp, world_size=layout.ranks
        )
        groups = group_sizes(stages)
        new = [name for name, ranks in groups.items() if (name, ranks) not in seen]
        if new:
            seen |= set(groups.items())
            found.append(Task(part="comm", name=layout.name, layout=layout, variant=",".join(new)))
    return found


def perform(task: Task, setup: Setup, world: World) -> dict[str, Any]:
    """Measure on every rank of an open default group."""
    from engine.runtime import mcore
    from launch.bench.comm import measure_groups, parse_sizes
    from launch.validate.runs import platform_for

    platform = platform_for(setup, world)
    stages = task.layout.pp * task.layout.vpp
    layout = ParallelLayout.resolve(task.layout.parallel(), num_layers=stages, world_size=world.size)
    groups = mcore.initialize(layout, platform, seed=0)
    sizes = parse_sizes(setup.config.validate.comm_sizes or _SIZES[setup.on_cpu])
    return measure_groups(layout, groups, platform, sizes, only=task.variant.split(",")).record()


def judge(setup: Setup) -> PartReport:
    """The tables of what was measured; there is no bound, a layout passes where it could be measured."""
    report = PartReport(part="comm", title="Bandwidth of process groups")
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for task in tasks(setup):
        result = setup.result(task)
        if result is None:
            report.checks.append(missing(setup, task, "bandwidth"))
            continue
        report.checks.append(outcome(task, "bandwidth", passed=True))
        report.record[task.name] = result["exchanges"]
        for one in result["exchanges"]:
            row = rows.setdefault((task.name, f"{one['group']} ({one['ranks']})", one["operation"]), {})
            row[size_name(one["bytes"])] = one["reason"] or f"{one['bus_gb_s']:.4g}"
    sizes = list(dict.fromkeys(size for row in rows.values() for size in row))
    columns = ("layout", "group (ranks)", "operation", *sizes)
    lines = [[*names, *(row.get(size, "") for size in sizes)] for names, row in rows.items()]
    report.tables.append(Table(title="bus bandwidth, GB/s, as in nccl-tests", columns=columns, rows=lines))
    return report
