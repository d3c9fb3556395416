"""The loss curve is what metrics.jsonl says."""

import itertools
import json
from pathlib import Path

import pytest

from engine.training.curve import draw_curve, read_curve, smooth


def test_curve_reads_training_and_evaluation_records(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": float("nan")},
        {"step": 2, "eval_loss": 2.5},
        {"step": 3, "loss": 2.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    curve = read_curve(path)
    assert (curve.steps, curve.losses) == ([1, 3], [3.0, 2.0])
    assert (curve.eval_steps, curve.eval_losses) == ([2], [2.5])
    draw_curve(curve, tmp_path / "loss.png", title="run")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_smoothing_starts_at_the_first_loss_and_keeps_a_constant() -> None:
    assert max(abs(x - 4.0) for x in smooth([4.0] * 100)) < 1e-12
    falling = smooth([float(100 - i) for i in range(100)])
    assert falling[0] == pytest.approx(100.0, rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert falling[-1] > 1.0
    assert smooth([]) == []
