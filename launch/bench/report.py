"""The results of `braid bench train`, on the terminal and as files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.parallel import ParallelLayout
from engine.training.curve import new_figure
from launch.bench.breakdown import Breakdown
from launch.bench.output import Table, provenance, write_files, write_json
from launch.bench.ranks import Environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MFU_CONVENTION = (
    "model FLOPs / (median step seconds x devices x dense bf16 peak of the card); model FLOPs of a token = "
    "6 x matmul weights that work on it (LM head included, embedding look-up not; with LoRA 4 x frozen and "
    "6 x adapter weights) + 6 x layers x heads x head dimension x tokens of its document (the causal half "
    "of attention); recomputation and padding earn no credit"
)
BREAKDOWN_NOTE = (
    "The breakdown comes from further steps under Megatron's timers, which wait for the device at every "
    "border: they are slower than the measured steps. Mean over ranks. Collectives of tensor, context and "
    "expert parallelism count as forward or backward; communication is the exchange between pipeline stages, "
    "waiting included, and what is left of gradient reduction behind the backward passes."
)
_PARTS = {
    "forward": "forward_s",
    "backward": "backward_s",
    "communication": "communication_s",
    "optimizer": "optimizer_s",
    "data wait": "data_s",
    "other": "other_s",
}
_COLORS = ("#1f5fa8", "#6f9fd0", "#c8552b", "#7a9b3a", "#b58bb5", "#c9c9c9")


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What `bench.json` holds. Rates are of the median step; tokens are real ones, without padding."""

    model: str
    """Name of the shape, or the directory of the config.json."""

    architecture: str
    parameters: int
    trained_parameters: int
    dtype: str
    transformer_impl: str
    attention: str
    """What computes it."""
    layout: ParallelLayout
    options: dict[str, Any]
    """All options as resolved."""

    global_batch_size: int
    """Packs of a step, or rows where they are not packed."""

    micro_batch_size: int
    accumulation: int
    step_seconds: list[float]
    """Of every measured step, on rank 0; waiting for data included."""

    median_step_s: float
    tokens_per_step: float
    """Mean over the measured steps, as the next two."""

    supervised_tokens_per_step: float
    rows_per_step: float
    padding_share: float
    """Share of the computed places that hold no token."""

    tokens_per_s: float
    tokens_per_s_per_device: float
    tflops_per_device: float
    """10**12 model FLOP/s; see MFU_CONVENTION."""

    mfu: float | None
    """None where the peak is not known."""

    peak_memory_gib: float | None
    """Largest of all ranks; on CUDA what torch allocated at most in the measured steps, on CPUs the resident
    set of the process since its start.
    """

    loss: float | None
    """Nats per supervised token before the update of the last measured step; None if it is not finite."""

    breakdown: Breakdown | None
    environment: Environment

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "train", "oom": False, **asdict(self), "mfu_convention": MFU_CONVENTION}


def write_train(report: TrainReport, output_dir: str | None) -> None:
    """Print the results, and write them where a directory is given."""
    tables = [_results(report), *([] if report.breakdown is None else [_parts(report.breakdown)])]
    for table in tables:
        table.show()
    if output_dir is None:
        return
    notes = [f"MFU: {MFU_CONVENTION}.", *([] if report.breakdown is None else [BREAKDOWN_NOTE])]
    sections = [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    markdown = "\n\n".join(
        [f"# braid bench train: {report.model}", provenance(report.environment), *sections, *notes]
    )
    write_files(Path(output_dir), "bench", report.record(), markdown, _picture(report))


def write_oom(output_dir: Path, message: str, options: dict[str, Any], environment: Environment) -> None:
    """Write a bench.json that says that memory was not enough. Any rank may."""
    record = {
        "kind": "train",
        "oom": True,
        "error": message,
        "options": options,
        "environment": asdict(environment),
    }
    write_json(output_dir / "bench.json", record)


def _results(report: TrainReport) -> Table:
    memory = "unknown" if report.peak_memory_gib is None else f"{report.peak_memory_gib:.2f} GiB"
    rows = [
        ("parameters", _count(report.parameters)),
        ("trained parameters", _count(report.trained_parameters)),
        ("layout", report.layout.summary()),
        ("arithmetic", _arithmetic(report)),
        ("attention", report.attention),
        (
            "step",
            f"{report.tokens_per_step:,.0f} tokens, {report.rows_per_step:,.1f} rows, global batch "
            f"{report.global_batch_size}",
        ),
        ("padding", f"{100 * report.padding_share:.2f} %"),
        ("seconds a step, median", f"{report.median_step_s:.4f}"),
        ("seconds of every step", " ".join(f"{seconds:.4f}" for seconds in report.step_seconds)),
        ("tokens/s", f"{report.tokens_per_s:,.1f}"),
        ("tokens/s per device", f"{report.tokens_per_s_per_device:,.1f}"),
        ("model TFLOP/s per device", f"{report.tflops_per_device:,.4g}"),
        ("MFU", "unknown" if report.mfu is None else f"{100 * report.mfu:.2f} %"),
        ("peak memory, largest of all ranks", memory),
        ("loss of the last step", "not finite" if report.loss is None else f"{report.loss:.4f}"),
    ]
    title = f"{report.model} on {report.layout.world_size} x {report.environment.device}"
    return Table(title=title, columns=("", "value"), rows=rows)


def _arithmetic(report: TrainReport) -> str:
    recipe = report.options.get("fp8_recipe")
    fp8 = "" if recipe is None else f", their linears in fp8 ({recipe}); MFU is against the bf16 peak"
    return f"{report.dtype}, layers of {report.transformer_impl}{fp8}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.2f} M"


def _parts(breakdown: Breakdown) -> Table:
    rows = []
    for name, field in _PARTS.items():
        seconds = getattr(breakdown, field)
        rows.append((name, f"{seconds:.4f}", f"{100 * seconds / breakdown.step_s:.1f} %"))
    rows.append(("step under timers", f"{breakdown.step_s:.4f}", "100.0 %"))
    title = f"where the time goes, mean of {breakdown.steps} steps under timers (slower than measured ones)"
    return Table(title=title, columns=("part", "seconds", "share"), rows=rows)


def _picture(report: TrainReport) -> "Figure":
    """Parts of a step as a stacked bar, and the seconds of every measured step."""
    figure = new_figure(width=8, height=4.5)
    figure.suptitle(
        f"{report.model}, {report.layout.world_size} x {report.environment.device}: "
        f"{report.tokens_per_s:,.0f} tokens/s"
    )
    if report.breakdown is None:
        steps = figure.add_subplot()
    else:
        bar, steps = figure.subplots(1, 2, width_ratios=(2, 3))
        bottom = 0.0
        for (name, field), color in zip(_PARTS.items(), _COLORS, strict=True):
            seconds = getattr(report.breakdown, field)
            share = 100 * seconds / report.breakdown.step_s
            bar.bar([0], [seconds], bottom=bottom, color=color, label=f"{name} {share:.0f} %")
            bottom += seconds
        bar.set_xlim(-0.6, 2.4)
        bar.set_xticks([])
        bar.set_ylabel("seconds of a step under timers")
        handles, labels = bar.get_legend_handles_labels()
        bar.legend(handles[::-1], labels[::-1], loc="center right", fontsize=8, frameon=False)
    numbers = range(1, len(report.step_seconds) + 1)
    steps.bar(numbers, report.step_seconds, color="#9db8d9")
    steps.axhline(report.median_step_s, color="#1f5fa8", label=f"median {report.median_step_s:.4g} s")
    steps.set_xticks(list(numbers) if len(numbers) <= 20 else [1, len(numbers)])
    steps.set_xlabel("measured step")
    steps.set_ylabel("seconds")
    steps.legend(loc="lower right")
    return figure
