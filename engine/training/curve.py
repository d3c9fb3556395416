"""The loss curve of a run as a picture, drawn from its metrics.jsonl."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The smoothed curve forgets a step after about this share of the run.
_MEMORY = 0.03


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses by step, in nats per supervised token."""

    steps: list[int]
    losses: list[float]
    eval_steps: list[int]
    eval_losses: list[float]


def read_curve(metrics: Path) -> Curve:
    """The records of a metrics.jsonl; records without a finite loss are left out."""
    curve = Curve(steps=[], losses=[], eval_steps=[], eval_losses=[])
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for key, steps, losses in (
            ("loss", curve.steps, curve.losses),
            ("eval_loss", curve.eval_steps, curve.eval_losses),
        ):
            value = record.get(key)
            if value is not None and abs(value) < float("inf"):
                steps.append(record["step"])
                losses.append(value)
    return curve


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start: the first value is the first loss."""
    keep = 1.0 - 1.0 / max(1.0, _MEMORY * len(losses))
    average, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        average = keep * average + (1.0 - keep) * loss
        weight = keep * weight + (1.0 - keep)
        smoothed.append(average / weight)
    return smoothed


def new_figure(*, width: float, height: float) -> "Figure":
    """An empty picture that needs no display; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curve(curve: Curve, picture: Path, *, title: str) -> None:
    """Write a PNG with the training loss, its smoothed course and the evaluation loss."""
    figure = new_figure(width=8, height=4.5)
    axes = figure.add_subplot()
    axes.plot(curve.steps, curve.losses, color="#9db8d9", linewidth=1, label="train")
    axes.plot(curve.steps, smooth(curve.losses), color="#1f5fa8", linewidth=2, label="train, smoothed")
    if curve.eval_steps:
        axes.plot(curve.eval_steps, curve.eval_losses, color="#c8552b", marker="o", label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per supervised token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
