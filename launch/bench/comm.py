"""`braid bench comm`: how fast the process groups of a layout exchange."""

import re
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.bench import CommBenchConfig
from engine.config.parallel import ParallelLayout
from engine.errors import ConfigError
from engine.training.curve import new_figure
from launch.bench.output import Table, provenance, write_files
from launch.bench.paper import check_outputs
from launch.bench.ranks import Environment, opened_groups
from launch.processes import World, open_world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engine.runtime.mcore import Groups
    from engine.runtime.platform import Platform

FACTORS_NOTE = (
    "Bandwidths as in nccl-tests, in GB/s (10**9): algorithm = bytes / seconds; bus = algorithm x "
    "2 (n - 1) / n for all_reduce, (n - 1) / n for all_gather, reduce_scatter and all_to_all, 1 for "
    "send_recv, n the ranks of the group. Bytes are those of the whole float32 buffer of a rank. Seconds are "
    "the median of calls timed one by one, of the slowest rank. All groups of a kind work at the same time. "
    "send_recv passes the buffer on to the next rank: in a ring, in pp from stage to stage."
)
SIZES = {
    False: tuple(2**20 * 4**step for step in range(6)),
    True: tuple(2**16 * 4**step for step in range(5)),
}
ITERATIONS = {False: 20, True: 5}
"""By whether the device is a CPU."""

_WARMUP = 3
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One operation over one kind of group at one size."""

    group: str
    ranks: int
    operation: str
    bytes: int
    seconds: float | None
    """Median; None where the backend does not have the operation."""

    algorithm_gb_s: float | None
    bus_gb_s: float | None
    reason: str | None
    """Why there are no numbers."""


@dataclass(frozen=True, kw_only=True)
class CommReport:
    """What `comm.json` holds."""

    layout: ParallelLayout
    exchanges: list[Exchange]
    environment: Environment

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "comm", **asdict(self), "factors": FACTORS_NOTE}


def draw_comm(config: CommBenchConfig, world: World) -> ParallelLayout:
    """The layout whose groups are measured. Raises ConfigError; imports neither torch nor Megatron."""
    parse_sizes(config.comm.sizes)
    if config.comm.iterations is not None and config.comm.iterations < 1:
        raise ConfigError(f"iterations must be at least 1, not {config.comm.iterations}")
    # There is no model: every stage gets a layer.
    stages = max(1, config.parallel.pipeline_model_parallel_size)
    layout = ParallelLayout.resolve(config.parallel, num_layers=stages, world_size=world.size)
    if world.size == 1:
        raise ConfigError("one process has nobody to exchange with; start several with NPROC_PER_NODE")
    return layout


def parse_sizes(words: Sequence[str]) -> list[int]:
    """Bytes of `1MiB`, `64K` or `1000`. Raises ConfigError."""
    sizes = []
    for word in words:
        found = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", word.strip(), flags=re.IGNORECASE)
        if found is None or int(found[1]) < 1:
            raise ConfigError(
                f"sizes must be numbers of bytes of at least 1, such as 64KiB or 1GiB, not {word!r}"
            )
        sizes.append(int(found[1]) * _UNITS[found[2].upper()])
    return sizes


def run(config: CommBenchConfig, world: World, place: list[str]) -> None:
    """One rank's whole benchmark; rank 0 prints and writes the results. Raises UserError."""
    from engine.runtime.platform import open_platform

    layout = draw_comm(config, world)
    open_world(world)
    options = config.comm
    if world.rank == 0:
        check_outputs(options.output_dir)
    platform = open_platform(
        device=options.device, dtype="float32", transformer_impl="torch", local_rank=world.local_rank
    )
    with opened_groups(layout, platform, world, place, seed=0) as groups:
        sizes = parse_sizes(options.sizes) or SIZES[platform.is_cpu]
        report = measure_groups(layout, groups, platform, sizes, options.iterations)
        if world.rank == 0:
            _write(report, options.output_dir)


def measure_groups(
    layout: ParallelLayout,
    groups: "Groups",
    platform: "Platform",
    sizes: Sequence[int],
    iterations: int | None = None,
    only: Collection[str] | None = None,
) -> CommReport:
    """Time every operation of every group, or of those in `only`, at every size; call on every rank."""
    from launch.bench.collectives import FACTORS

    iterations = iterations or ITERATIONS[platform.is_cpu]
    exchanges = [
        measure(name, group, operation, size, iterations, platform)
        for name, group in process_groups(groups).items()
        if only is None or name in only
        for operation in FACTORS
        for size in sizes
    ]
    return CommReport(layout=layout, exchanges=exchanges, environment=Environment.here(platform))


def process_groups(groups: "Groups") -> dict[str, Any]:
    """The groups of more than one rank that this rank is in, the same names on every rank."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    experts = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["ep"])
    found = {
        "tp": groups.tp,
        "cp": groups.cp,
        "dp_cp": groups.dp_cp,
        "ep": experts.ep,
        "pp": groups.pp,
        "world": dist.group.WORLD,
    }
    return {name: group for name, group in found.items() if dist.get_world_size(group) > 1}


def measure(
    name: str, group: Any, operation: str, size: int, iterations: int, platform: "Platform"
) -> Exchange:
    """Time one operation at one size; call on every rank."""
    import torch.distributed as dist

    from launch.bench.collectives import Message, bus_factor, call_of

    ranks = dist.get_world_size(group)
    message = Message.of(size, ranks, platform.device)
    call = call_of(operation, message, group, ring=name != "pp")
    seconds = _median_seconds(call, iterations, platform)
    rate = None if seconds is None else message.bytes / seconds / 1e9
    return Exchange(
        group=name,
        ranks=ranks,
        operation=operation,
        bytes=message.bytes,
        seconds=seconds,
        algorithm_gb_s=rate,
        bus_gb_s=None if rate is None else rate * bus_factor(operation, ranks),
        reason=None if rate is not None else f"not supported by {platform.backend}",
    )


def _median_seconds(call: Callable[[], None], iterations: int, platform: "Platform") -> float | None:
    """Median of the calls on the slowest rank; None where the backend does not have the operation."""
    import torch
    import torch.distributed as dist

    # On every rank alike: whether a backend has an operation is not a matter of the rank.
    try:
        for _ in range(_WARMUP):
            call()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if not is_unsupported(error):
            raise
        return None
    seconds = []
    for _ in range(iterations):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64, device=platform.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def is_unsupported(error: Exception) -> bool:
    """Whether a backend says that it does not have an operation, as torch's backends put it."""
    if isinstance(error, NotImplementedError):
        return True
    return re.search(r"(not|n't) (support|implement)|unsupported", str(error), re.IGNORECASE) is not None


def size_name(size: int) -> str:
    """Bytes in the largest unit that shows them as a short number."""
    for unit in ("G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.4g} {unit}iB"
    return f"{size} B"


def _write(report: CommReport, output_dir: str | None) -> None:
    rows = []
    for one in report.exchanges:
        known = one.seconds is not None
        numbers = (one.seconds, one.algorithm_gb_s, one.bus_gb_s)
        shown = (
            [f"{value:.4g}" for value in numbers if value is not None]
            if known
            else [one.reason or "", "", ""]
        )
        rows.append([f"{one.group} ({one.ranks})", one.operation, size_name(one.bytes), *shown])
    device = f"{report.layout.world_size} x {report.environment.device}"
    table = Table(
        title=f"{device} over {report.environment.backend}: {report.layout.summary()}",
        columns=("group (ranks)", "operation", "size", "seconds", "algorithm GB/s", "bus GB/s"),
        rows=rows,
    )
    table.show()
    if output_dir is None:
        return
    parts = ["# braid bench comm", provenance(report.environment), f"## {table.title}", table.markdown()]
    write_files(
        Path(output_dir), "comm", report.record(), "\n\n".join([*parts, FACTORS_NOTE]), _picture(report)
    )


def _picture(report: CommReport) -> "Figure":
    """Bus bandwidth over size, one panel for each group."""
    names = list(dict.fromkeys(one.group for one in report.exchanges))
    figure = new_figure(width=4 * len(names) + 1, height=4.2)
    figure.suptitle(f"{report.layout.summary()}, {report.environment.device}, {report.environment.backend}")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        mine = [one for one in report.exchanges if one.group == name]
        for operation in dict.fromkeys(one.operation for one in mine):
            points = [
                (one.bytes, one.bus_gb_s) for one in mine if one.operation == operation and one.bus_gb_s
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=operation)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{name}, {mine[0].ranks} ranks")
        axes.set_xlabel("bytes")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bus bandwidth, GB/s")
    panels[0].legend(fontsize=8)
    return figure
