"""The report of everything that lies in the directory of results: JSON, Markdown and a picture."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine.config.options import ModelOptions
from engine.config.parse import flatten
from engine.training.curve import new_figure
from launch.bench.output import Table, provenance, write_files
from launch.bench.ranks import Environment, command_line
from launch.gpu import visible_card
from launch.record import git_revision, versions
from launch.validate import comm, curves, doctor, parity, resume, speed
from launch.validate.layouts import NAMES, layouts_of
from launch.validate.tasks import Setup
from launch.validate.verdict import Check, PartReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_JUDGES = {
    "doctor": doctor.judge,
    "comm": comm.judge,
    "parity": parity.judge,
    "curves": curves.judge,
    "resume": resume.judge,
    "speed": speed.judge,
}


def write_report(setup: Setup) -> int:
    """Write report.json, report.md and report.png. Returns 0 where nothing failed and nothing is missing of
    what was asked for, 1 otherwise.
    """
    asked = setup.config.validate.parts
    seen = _with_known_layouts(setup)
    reports = [judge(seen) for part, judge in _JUDGES.items() if part in asked or _has_results(setup, part)]
    passed = passes(reports, asked, [layout.name for layout in setup.layouts])
    environment = _environment(setup)
    record = {
        "kind": "validation",
        "passed": passed,
        "processes": setup.ranks,
        "layouts": [asdict(layout) for layout in seen.layouts],
        "options": flatten(setup.config),
        "bounds": vars(setup.config.bounds),
        "environment": asdict(environment),
        "parts": {
            report.part: {
                "state": report.state,
                "checks": [asdict(check) for check in report.checks],
                "notes": report.notes,
                "results": report.record,
            }
            for report in reports
        },
    }
    summary = _summary(reports)
    summary.show()
    verdict = "Every layout passed." if passed else "Not every layout passed."
    markdown = [f"# braid validate: {setup.ranks} x {environment.device}", verdict, provenance(environment)]
    markdown += [summary.markdown(), *_failures(reports), *(_section(report) for report in reports)]
    write_files(setup.root, "report", record, "\n\n".join(markdown), _picture(reports))
    print(verdict, flush=True)
    return 0 if passed else 1


def passes(reports: Sequence[PartReport], parts: Sequence[str], layouts: Sequence[str]) -> bool:
    """Whether nothing failed, and nothing of the parts and layouts that were asked for is missing."""

    def counts(check: Check) -> bool:
        return check.part in parts and (check.layout not in NAMES or check.layout in layouts)

    checks = [check for report in reports for check in report.checks]
    failed = any(check.state == "failed" for check in checks)
    return not failed and not any(check.state == "not run" and counts(check) for check in checks)


def _has_results(setup: Setup, part: str) -> bool:
    return (setup.root / part).exists() or (setup.root / f"{part}.json").exists()


def _with_known_layouts(setup: Setup) -> Setup:
    """The layouts that were asked for, and those that other calls have looked at."""
    names = [layout.name for layout in setup.layouts]
    for layout in layouts_of(setup.ranks):
        if any((setup.root / part / layout.name).exists() for part in ("comm", "parity", "curves", "resume")):
            names.append(layout.name)
    options = replace(setup.config.validate, layouts=names)
    return replace(setup, config=replace(setup.config, validate=options))


def _environment(setup: Setup) -> Environment:
    card = visible_card(ModelOptions(device="cpu" if setup.on_cpu else "cuda"))
    return Environment(
        command=command_line(sys.argv[1:]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        revision=git_revision(),
        versions=versions(),
        cuda=None,
        device="cpu" if card is None else card.name,
        backend="gloo" if setup.on_cpu else "nccl",
    )


def _summary(reports: Sequence[PartReport]) -> Table:
    """How many checks of each part ended how."""
    states = ("passed", "failed", "not run", "does not apply")
    rows = []
    for report in reports:
        counts = [sum(check.state == state for check in report.checks) for state in states]
        rows.append([report.title, report.state, *(str(count) if count else "" for count in counts)])
    return Table(title="braid validate", columns=("", "", *states), rows=rows)


def _failures(reports: Sequence[PartReport]) -> list[str]:
    found = [check for report in reports for check in report.checks if check.state in ("failed", "not run")]
    rows = [
        [check.layout, check.name, check.state, _number(check.value), _number(check.bound), check.note]
        for check in found
    ]
    columns = ("layout", "what", "", "found", "bound", "why")
    return [Table(title="", columns=columns, rows=rows).markdown()] if rows else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _section(report: PartReport) -> str:
    tables = [f"### {table.title}\n\n{table.markdown()}" for table in report.tables if table.rows]
    return "\n\n".join([f"## {report.title}: {report.state}", *report.notes, *tables])


def _picture(reports: Sequence[PartReport]) -> "Figure":
    """Loss curves, speed and bandwidth, as far as they are there."""
    found = {
        report.part: {name: result for name, result in report.record.items() if name != "efficiency"}
        for report in reports
    }
    drawn = {part: draw for part, draw in _PANELS.items() if found.get(part)}
    figure = new_figure(width=max(1, len(drawn)) * 5.5, height=4.5)
    for place, (part, draw) in enumerate(drawn.items(), start=1):
        draw(figure.add_subplot(1, len(drawn), place), found[part])
    return figure


def _draw_curves(axes: "Axes", curves: dict[str, Any]) -> None:
    for name, losses in curves.items():
        one = name.startswith("one-")
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=2.5 if one else 1, alpha=0.8)
    axes.set_title("loss")
    axes.set_xlabel("step")
    axes.legend(fontsize=6)


def _draw_speed(axes: "Axes", results: dict[str, Any]) -> None:
    axes.barh(list(results), [result["tokens_per_s_per_device"] for result in results.values()])
    for place, result in enumerate(results.values()):
        if result["mfu"] is not None:
            axes.text(0, place, f" MFU {100 * result['mfu']:.1f} %", va="center", color="white", fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title("tokens/s per GPU")


def _draw_bandwidth(axes: "Axes", results: dict[str, Any]) -> None:
    """Of the largest messages."""
    bars: dict[str, float] = {}
    for one in (one for exchanges in results.values() for one in exchanges):  # sizes come in order
        if one["bus_gb_s"] is not None:
            bars[f"{one['group']} ({one['ranks']}) {one['operation']}"] = one["bus_gb_s"]
    axes.barh(list(bars), list(bars.values()))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=5)
    axes.set_title("bus bandwidth, GB/s, largest message")


_PANELS = {"curves": _draw_curves, "speed": _draw_speed, "comm": _draw_bandwidth}
