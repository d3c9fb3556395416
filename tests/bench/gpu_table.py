"""The table of `make bench-gpu`, made from what the cases left in a directory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.bench.output import Table, write_json, write_whole
from launch.bench.report import MFU_CONVENTION
from tests.bench.gpu_cases import LENGTH, Case, Settings

RESULT, FAILURE = "bench.json", "failure.json"
COLUMNS = ("case", "tokens/s", "MFU", "peak GiB", "s a step", "ratio", "to compare", "remark")
NOTES = (
    "Random weights and tokens. Every case is a process of its own: one step of warm-up, then the "
    "measured ones. Tokens/s, MFU and ratios are those of the median step; peak memory is what torch "
    "allocated at most in the measured steps. Tokens are real ones: padding is not counted. Ratios are "
    "of tokens/s, between rows of one card: `1.10 x torch` is 1.10 times the tokens/s of the same case "
    "with the layers of plain torch.",
    f"Braid's cases train packs of {LENGTH:,} tokens, of rows of many lengths; `even` ones train rows of "
    f"{LENGTH:,} tokens, as the peers do, and are what the peers are to be compared with. Braid keeps "
    "fp32 master weights, adds gradients up in fp32, and has AdamW's moments in fp32, in bf16 where the "
    "command says so.",
    "Peers: a plain training loop on transformers with attention by torch's "
    "scaled_dot_product_attention and torch's fused AdamW, full rows without a mask, tokens made on the "
    "device; as many tokens a step as Braid. `transformers` and `liger` have weights, gradients and "
    "AdamW's states in bf16 and no fp32 master weights: the faster and leaner variant, and less precise "
    "than Braid's, so the comparison favours the peer. `liger-mixed` has all of them in fp32, with "
    "products in bf16 under autocast: what `--bf16` of transformers' Trainer does with a model loaded "
    "in fp32. `liger` adds Liger's kernels for RMSNorm, rotary embedding, SwiGLU and linear + "
    "cross-entropy. Peers of the 7 B shape recompute their layers.",
    f"MFU: {MFU_CONVENTION}. With fp8 too it is against the bf16 peak.",
    "`to compare`: tokens/s that others publish for this shape and task; not measured here.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a case."""

    case: Case
    command: str
    record: Mapping[str, Any] | None = None
    """Its bench.json; None without numbers."""
    reason: str | None = None
    """Why there are no numbers."""
    oom: bool = False

    @property
    def device(self) -> str | None:
        return None if self.record is None else str(self.record["environment"]["device"])

    def ratios(self, rows: Mapping[str, "Row"]) -> dict[str, float]:
        """Tokens/s over those of the baselines that were measured on the same card."""
        found = {}
        for label, name in self.case.baselines.items():
            other = rows.get(name)
            if self.record is None or other is None or other.record is None or other.device != self.device:
                continue
            found[label] = self.record["tokens_per_s"] / other.record["tokens_per_s"]
        return found


def read_row(case: Case, settings: Settings, root: Path) -> Row:
    """From the case's directory in `root`, or the reason why there is none."""
    directory = root / case.name
    command = case.shown_command(settings, directory)
    if (directory / RESULT).is_file():
        record = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        command = str(record["environment"]["command"])
        if record.get("oom"):
            return Row(case=case, command=command, oom=True, reason=str(record["error"]))
        return Row(case=case, command=command, record=record)
    if (directory / FAILURE).is_file():
        failure = json.loads((directory / FAILURE).read_text(encoding="utf-8"))
        return Row(case=case, command=command, reason=f"failed: {failure['reason']}")
    missing = case.missing()
    reason = "not run yet" if missing is None else f"not run: {missing} is not installed"
    return Row(case=case, command=command, reason=reason)


def read_rows(cases: Iterable[Case], asked: Sequence[Case], settings: Settings, root: Path) -> list[Row]:
    """Of the cases that were asked for, and of those that lie in the directory from before."""
    names = {case.name for case in asked}
    return [
        read_row(case, settings, root) for case in cases if case.name in names or (root / case.name).is_dir()
    ]


def table(rows: Sequence[Row]) -> Table:
    """One line for every row; nothing is judged."""
    by_name, lines = {row.case.name: row for row in rows}, []
    for row in rows:
        ratios = ", ".join(f"{value:.2f} x {label}" for label, value in row.ratios(by_name).items())
        lines.append((row.case.name, *_numbers(row), ratios, row.case.target, row.reason or ""))
    return Table(
        title=f"One GPU: {', '.join(_devices(rows)) or 'nothing measured yet'}", columns=COLUMNS, rows=lines
    )


def _numbers(row: Row) -> tuple[str, str, str, str]:
    if row.record is None:
        return "", "", "", ""
    mfu, memory = row.record["mfu"], row.record["peak_memory_gib"]
    return (
        f"{row.record['tokens_per_s']:,.0f}",
        "unknown" if mfu is None else f"{100 * mfu:.1f} %",
        "unknown" if memory is None else f"{memory:.1f}",
        f"{row.record['median_step_s']:.2f}",
    )


def outcome(row: Row) -> str:
    """A row in a few words."""
    if row.record is None:
        return row.reason or "failed"
    speed, mfu, memory, _ = _numbers(row)
    return f"{speed} tokens/s, MFU {mfu}, {memory} GiB"


def write(rows: Sequence[Row], settings: Settings, root: Path) -> None:
    """Write gpu.json and gpu.md into `root`."""
    write_json(root / "gpu.json", _record(rows, settings))
    write_whole(root / "gpu.md", _markdown(rows, settings))


def _record(rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """For JSON."""
    by_name = {row.case.name: row for row in rows}
    copied = (
        "tokens_per_s", "mfu", "peak_memory_gib", "median_step_s", "step_seconds", "tokens_per_step",
        "tflops_per_device", "arithmetic", "environment",
    )  # fmt: skip
    listed = [
        {
            "name": row.case.name,
            "peer": row.case.peer,
            "command": row.command,
            "reason": row.reason,
            "oom": row.oom,
            "ratios": row.ratios(by_name),
            "target": row.case.target,
            **{name: (row.record or {}).get(name) for name in copied},
        }
        for row in rows
    ]
    return {"kind": "gpu", "settings": asdict(settings), "rows": listed, "notes": list(NOTES)}


def _markdown(rows: Sequence[Row], settings: Settings) -> str:
    found = table(rows)
    commands = [f"- {row.case.name}: `{row.command}`" for row in rows]
    paragraphs = [
        f"# {found.title}",
        _provenance(rows),
        f"Steps of {settings.global_batch_size * LENGTH:,} tokens, {settings.steps} measured.",
        found.markdown(),
        *NOTES,
        "Commands:",
        "\n".join(commands),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _devices(rows: Sequence[Row]) -> list[str]:
    return sorted({row.device for row in rows if row.device is not None})


def _provenance(rows: Sequence[Row]) -> str:
    """Card, dates, revision and versions; what rows do not share is said for each."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row.record is None:
            continue
        environment = row.record["environment"]
        versions = environment["versions"]
        known = [f"{name} {versions[name]}" for name in versions if versions[name] and name != "liger-kernel"]
        cuda = [f"CUDA {environment['cuda']}"] if environment["cuda"] else []
        where = f"{environment['device']}; git revision {environment['revision'] or 'unknown'}; "
        day = str(environment["date"])[:10]
        lines.setdefault(where + ", ".join(known + cuda), []).append((row.case.name, day))
    parts = []
    for text, entries in lines.items():
        days = sorted({day for _, day in entries})
        of = f" ({', '.join(name for name, _ in entries)})" if len(lines) > 1 else ""
        parts.append(f"{' and '.join(days)} on {text}{of}.")
    liger = {row.record["environment"]["versions"].get("liger-kernel") for row in rows if row.record}
    parts += [f"liger-kernel {number}." for number in sorted(filter(None, liger))]
    return "\n".join(parts)
