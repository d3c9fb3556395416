"""Where metrics go besides metrics.jsonl. Each service is imported only when it is asked for."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PROJECT = "braid"
"""Name of the project or experiment, unless the service's own environment variable has one."""


class Reporter(Protocol):
    """Receives the numbers of a logged step or evaluation."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """`step` counts from 1 and never falls."""

    def close(self) -> None:
        """Nothing comes after this."""


def open_reporters(
    names: Sequence[str], output_dir: Path, options: Mapping[str, Any], *, resumed_step: int
) -> list[Reporter]:
    """The reporters of `report_to`, in its order. `options` are shown as the run's configuration."""
    return [_REPORTERS[name](output_dir, options, resumed_step) for name in names if name != "none"]


class TensorBoard:
    """Event files in `runs/`."""

    def __init__(self, output_dir: Path, options: Mapping[str, Any], resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "runs"), purge_step=resumed_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, named after the output directory; resumed, it goes on in the same chart."""

    # Wandb chooses the id: one made from the path would meet the run of another machine or a deleted run.
    ID_FILE = "wandb_run_id.txt"

    def __init__(self, output_dir: Path, options: Mapping[str, Any], resumed_step: int) -> None:
        import wandb

        id_file = output_dir / self.ID_FILE
        known = id_file.read_text(encoding="utf-8") if resumed_step and id_file.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=output_dir.resolve().name,
            id=known,
            resume="allow" if known else None,
            dir=str(output_dir),
            config=dict(options),
        )
        id_file.write_text(self._run.id, encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """An experiment of SwanLab."""

    def __init__(self, output_dir: Path, options: Mapping[str, Any], resumed_step: int) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            experiment_name=output_dir.resolve().name,
            logdir=str(output_dir / "swanlog"),
            config=dict(options),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._swanlab.log(dict(values), step=step)

    def close(self) -> None:
        self._swanlab.finish()


class MLflow:
    """A run of MLflow, resumed or not; MLFLOW_TRACKING_URI says where, by default beside the other files."""

    def __init__(self, output_dir: Path, options: Mapping[str, Any], resumed_step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{output_dir.resolve() / 'mlflow.db'}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mlflow.start_run(run_name=output_dir.resolve().name)
        mlflow.log_params({name: str(value)[:500] for name, value in options.items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_REPORTERS: dict[str, Callable[[Path, Mapping[str, Any], int], Reporter]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "swanlab": SwanLab,
    "mlflow": MLflow,
}
