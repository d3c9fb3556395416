"""`braid bench sweep`: `braid bench train` with every setting that fits, the best first."""

import contextlib
import copy
import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from engine.config.bench import SweepBenchConfig, TrainBenchConfig
from engine.config.parse import flatten, options_of
from engine.errors import ConfigError, UserError
from engine.training.curve import new_figure
from launch.bench.output import Table, write_files, write_json
from launch.bench.paper import check_outputs, draw_bench, read_spec
from launch.bench.ranks import command_line
from launch.gpu import visible_card
from launch.memory import check_card
from launch.processes import ENVIRONMENT, World, environment_of_one
from launch.record import git_revision, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Micro-batches of the largest size that a data-parallel rank gets, where no global batch is asked for.
_MICRO_BATCHES = 4
_SAYS = "braid bench: "


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of one case."""

    tp: int
    pp: int
    cp: int
    ep: int
    micro_batch_size: int
    recompute: str

    @property
    def name(self) -> str:
        """Short, and fit for a directory."""
        cp, ep = (f"-{n}{d}" if d > 1 else "" for n, d in (("cp", self.cp), ("ep", self.ep)))
        recompute = "" if self.recompute == "none" else f"-{self.recompute}"
        return f"tp{self.tp}-pp{self.pp}{cp}{ep}-mb{self.micro_batch_size}{recompute}"

    def options(self) -> dict[str, str]:
        """As options of `braid bench train`."""
        values: dict[str, int | str] = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "per_device_train_batch_size": self.micro_batch_size,
        }
        if self.recompute != "none":
            values["recompute_granularity"] = self.recompute
        return {name: str(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What became of a candidate; numbers are those of bench.json, None where it did not run."""

    candidate: Candidate
    tokens_per_s: float | None = None
    tflops_per_device: float | None = None
    mfu: float | None = None
    median_step_s: float | None = None
    peak_memory_gib: float | None = None
    oom: bool = False
    reason: str | None = None
    """Why there are no numbers."""


def run(config: SweepBenchConfig, world: World) -> int:
    """The command. Returns 0 where at least one case ran, 1 otherwise; raises UserError before the first."""
    check_sweep(config, world)
    candidates, refused = draw_sweep(config, world)
    output_dir = config.bench.output_dir
    with tempfile.TemporaryDirectory(prefix="braid-sweep-") as folder:
        root = Path(output_dir or folder)
        print(f"{len(candidates)} cases on {world.size} processes; {len(refused)} combinations do not fit")
        cases: list[Case] = []
        with ending_on_sigterm():
            for number, candidate in enumerate(candidates, start=1):
                directory = root / f"case-{number:03d}-{candidate.name}"
                case = _run_case(config, candidate, world, directory)
                cases = sorted([*cases, case], key=lambda case: -(case.tokens_per_s or 0.0))
                print(f"[{number}/{len(candidates)}] {candidate.name}: {_outcome(case)}", flush=True)
                # A sweep that is ended keeps what it has measured.
                write_json(root / "sweep.json", _record(config, cases, refused))
        _write(config, cases, refused, output_dir)
    return 0 if any(case.tokens_per_s for case in cases) else 1


def check_sweep(config: SweepBenchConfig, world: World) -> None:
    """Raise UserError for what is wrong with the processes or the output, whatever is swept."""
    if world.started:
        raise ConfigError("sweep starts processes itself; run it once, not under torchrun or srun")
    if (config.launch.nnodes or 1) > 1:
        raise ConfigError("sweep works on one node; run braid bench train for layouts over several")
    check_outputs(config.bench.output_dir)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the case that runs is ended too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def draw_sweep(config: SweepBenchConfig, world: World) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that fit the model, the processes and the card, and why others do not, by name. Sets the
    global batch of all cases where none is asked for. Raises UserError where none fits.
    """
    sweep, spec = config.sweep, read_spec(config)
    _check_lists(config)
    if config.batch.global_batch_size is None:
        config.batch.global_batch_size = world.size * _MICRO_BATCHES * max(sweep.micro_batch_sizes)
    divisors = [degree for degree in range(1, world.size + 1) if world.size % degree == 0]
    found = itertools.product(
        sweep.tensor_model_parallel_sizes or divisors,
        sweep.pipeline_model_parallel_sizes or divisors,
        sweep.context_parallel_sizes,
        sweep.expert_model_parallel_sizes or (divisors if spec.moe is not None else [1]),
        sweep.micro_batch_sizes,
        sweep.recompute,
    )
    fitting, refused, card = [], {}, visible_card(config.model)
    for tp, pp, cp, ep, micro_batch_size, recompute in found:
        candidate = Candidate(
            tp=tp, pp=pp, cp=cp, ep=ep, micro_batch_size=micro_batch_size, recompute=recompute
        )
        try:
            check_card(draw_bench(train_config(config, candidate), world), card)
            fitting.append(candidate)
        except UserError as error:
            refused[candidate.name] = str(error)
    if not fitting:
        raise ConfigError(f"nothing fits: {next(iter(refused.values()))}")
    return fitting, refused


def _check_lists(config: SweepBenchConfig) -> None:
    sweep = config.sweep
    for item in fields(sweep):
        values = getattr(sweep, item.name)
        if isinstance(values, list) and any(isinstance(value, int) and value < 1 for value in values):
            raise ConfigError(f"{item.name} must be at least 1, not {min(values)}")
    if not sweep.micro_batch_sizes or not sweep.context_parallel_sizes or not sweep.recompute:
        raise ConfigError("micro_batch_sizes, context_parallel_sizes and recompute need at least one value")
    if sweep.case_timeout <= 0:
        raise ConfigError(f"case_timeout must be positive, not {sweep.case_timeout}")


def train_config(config: SweepBenchConfig, candidate: Candidate) -> TrainBenchConfig:
    """The options of a case, as a config to be checked."""
    groups = {item.name: copy.deepcopy(getattr(config, item.name)) for item in fields(TrainBenchConfig)}
    train = TrainBenchConfig(**groups)
    train.bench.output_dir = None
    train.parallel.tensor_model_parallel_size = candidate.tp
    train.parallel.pipeline_model_parallel_size = candidate.pp
    train.parallel.context_parallel_size = candidate.cp
    train.parallel.expert_model_parallel_size = candidate.ep
    train.batch.per_device_train_batch_size = candidate.micro_batch_size
    for name in ("full", "selective"):
        if candidate.recompute == name:
            train.recompute.recompute_granularity = name
    return train


def case_words(config: SweepBenchConfig, candidate: Candidate, directory: Path) -> list[str]:
    """The command line of a case, behind `braid`: what differs from the defaults."""
    table, words = options_of(TrainBenchConfig), ["bench", "train"]
    asked = flatten(config) | {"output_dir": str(directory)}
    for name, option in table.items():
        value = asked.get(name, option.default)
        if value != option.default and name not in ENVIRONMENT.values():
            words += [f"--{name}", *_as_words(value)]
    for name, text in candidate.options().items():
        words += [f"--{name}", text]
    return words


def _as_words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) or value is None else str(value)]


def _run_case(config: SweepBenchConfig, candidate: Candidate, world: World, directory: Path) -> Case:
    """Run a candidate in processes of its own."""
    environment = environment_of_one() | {"NPROC_PER_NODE": str(world.local_size)}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *case_words(config, candidate, directory)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, printed = process.communicate(timeout=config.sweep.case_timeout)
    except subprocess.TimeoutExpired:
        end_process(process)
        return Case(candidate=candidate, reason=f"no result after {config.sweep.case_timeout:g} s")
    except BaseException:
        end_process(process)
        raise
    return read_case(candidate, directory / "bench.json", process.returncode, printed)


def end_process(process: subprocess.Popen[Any]) -> None:
    """End a case, and the processes that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        launcher.suspend()  # it starts no more
        for member in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def read_case(candidate: Candidate, path: Path, code: int, printed: str) -> Case:
    """What a case left: its bench.json, or the last line that it printed as the reason."""
    record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("oom"):
        return Case(candidate=candidate, oom=True, reason=str(record["error"]))
    if code or not record:
        return Case(candidate=candidate, reason=failure_reason(printed, code))
    numbers = {item.name: record[item.name] for item in fields(Case) if item.name in record}
    return Case(candidate=candidate, **numbers)


def failure_reason(printed: str, code: int) -> str:
    """The line that says why a case failed; of a traceback its last."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or [f"exit code {code}"]
    said = next((line for line in reversed(lines) if line.startswith(_SAYS)), lines[-1])
    return (lines[-1] if said.endswith(":") else said).removeprefix(_SAYS)


def _outcome(case: Case) -> str:
    if case.tokens_per_s is None:
        return case.reason or "failed"
    mfu = "" if case.mfu is None else f", MFU {100 * case.mfu:.1f} %"
    memory = "" if case.peak_memory_gib is None else f", {case.peak_memory_gib:.1f} GiB"
    return f"{case.tokens_per_s:,.0f} tokens/s{mfu}{memory}"


def _record(config: SweepBenchConfig, cases: Sequence[Case], refused: Mapping[str, str]) -> dict[str, Any]:
    """For JSON."""
    return {
        "kind": "sweep",
        "model": _model(config),
        "options": flatten(config),
        "global_batch_size": config.batch.global_batch_size,
        "cases": [{"name": case.candidate.name, **asdict(case)} for case in cases],
        "refused": dict(refused),
        "command": command_line(sys.argv[1:]),
        "revision": git_revision(),
        "versions": versions(),
    }


def _model(config: SweepBenchConfig) -> str:
    return str(config.bench.shape or config.model.model)


def _write(
    config: SweepBenchConfig, cases: Sequence[Case], refused: Mapping[str, str], output_dir: str | None
) -> None:
    model, table = _model(config), _table(_model(config), cases)
    table.show()
    if output_dir is None:
        return
    reasons = [f"- {name}: {reason}" for name, reason in refused.items()]
    markdown = [
        f"# braid bench sweep: {model}",
        f"```\n{command_line(sys.argv[1:])}\n```",
        f"Global batch {config.batch.global_batch_size}. Every case's own results are beside this file.",
        table.markdown(),
        *(["Combinations that do not fit:", "\n".join(reasons)] if reasons else []),
    ]
    record = _record(config, cases, refused)
    write_files(Path(output_dir), "sweep", record, "\n\n".join(markdown), _picture(model, cases))


def _table(model: str, cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        mfu = "" if case.mfu is None else f"{100 * case.mfu:.1f} %"
        memory = "" if case.peak_memory_gib is None else f"{case.peak_memory_gib:.1f}"
        seconds = "" if case.median_step_s is None else f"{case.median_step_s:.3f}"
        speed = "" if case.tokens_per_s is None else f"{case.tokens_per_s:,.0f}"
        rows.append((case.candidate.name, speed, mfu, seconds, memory, case.reason or ""))
    columns = ("case", "tokens/s", "MFU", "s a step", "GiB", "why not")
    return Table(title=f"{model}, the best first", columns=columns, rows=rows)


def _picture(model: str, cases: Sequence[Case]) -> "Figure":
    """Tokens/s of every case that ran, the best on top."""
    figure = new_figure(width=8, height=max(2.0, 0.3 * len(cases) + 1.2))
    axes = figure.add_subplot()
    names = [case.candidate.name for case in cases]
    axes.barh(names, [case.tokens_per_s or 0.0 for case in cases], color="#1f5fa8")
    for place, case in enumerate(cases):
        if case.tokens_per_s is None:
            axes.text(0, place, " out of memory" if case.oom else " failed", va="center", color="#c8552b")
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    axes.set_title(model)
    return figure
