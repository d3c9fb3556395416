"""Metrics reach metrics.jsonl and the services of `report_to`; a resumed run goes on where it left off."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine.training.metrics import MetricsLog
from engine.training.reporters import MLflow, SwanLab, Wandb, open_reporters

OPTIONS = {"learning_rate": 1e-3, "dataset": ["a.jsonl"], "system": None}


class FakeService(ModuleType):
    """A module whose functions only remember how they were called."""

    def __init__(self, name: str, *functions: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for function in functions:
            setattr(self, function, self._recorder(function))

    def _recorder(self, function: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((function, args, kwargs))
            # What wandb.init returns.
            run_id = kwargs.get("id") or f"id{len(self.calls)}"
            return SimpleNamespace(
                id=run_id, log=self._recorder("run.log"), finish=self._recorder("run.finish")
            )

        return call

    def called(self, function: str) -> list[dict[str, Any]]:
        """Keyword arguments of the calls of one function."""
        return [kwargs for name, _, kwargs in self.calls if name == function]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    return _install(monkeypatch, FakeService("wandb", "init"), "WANDB_PROJECT")


@pytest.fixture
def swanlab(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    return _install(monkeypatch, FakeService("swanlab", "init", "log", "finish"), "SWANLAB_PROJ_NAME")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    functions = (
        "set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run",
    )  # fmt: skip
    fake = FakeService("mlflow", *functions)
    return _install(monkeypatch, fake, "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")


def _install(monkeypatch: pytest.MonkeyPatch, fake: FakeService, *variables: str) -> FakeService:
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "my-run"
    directory.mkdir()
    return directory


def test_wandb_gets_a_run_and_its_steps(wandb: FakeService, output_dir: Path) -> None:
    (reporter,) = open_reporters(["wandb"], output_dir, OPTIONS, resumed_step=0)
    reporter.log(1, {"loss": 2.0, "lr": 0.1})
    reporter.log(1, {"eval_loss": 3.0})
    reporter.close()
    init = {
        "project": "braid",
        "name": "my-run",
        "id": None,
        "resume": None,
        "dir": str(output_dir),
        "config": OPTIONS,
    }
    assert wandb.calls == [
        ("init", (), init),
        ("run.log", ({"loss": 2.0, "lr": 0.1},), {"step": 1}),
        ("run.log", ({"eval_loss": 3.0},), {"step": 1}),
        ("run.finish", (), {}),
    ]


def test_a_resumed_run_goes_on_in_its_wandb_run(wandb: FakeService, output_dir: Path) -> None:
    for resumed_step in (0, 5, 9):
        Wandb(output_dir, OPTIONS, resumed_step)
    Wandb(output_dir, OPTIONS, 0)  # started anew in the same place
    asked = [(kwargs["id"], kwargs["resume"]) for kwargs in wandb.called("init")]
    assert asked == [(None, None), ("id1", "allow"), ("id1", "allow"), (None, None)]
    # Resumed from a run that reported elsewhere: nothing to go on with.
    Wandb(output_dir.parent, OPTIONS, 5)
    assert wandb.called("init")[-1]["id"] is None


def test_swanlab_gets_an_experiment_and_its_steps(swanlab: FakeService, output_dir: Path) -> None:
    (reporter,) = open_reporters(["swanlab"], output_dir, OPTIONS, resumed_step=4)
    reporter.log(5, {"loss": 2.0})
    reporter.close()
    init = {
        "project": "braid",
        "experiment_name": "my-run",
        "logdir": str(output_dir / "swanlog"),
        "config": OPTIONS,
    }
    assert swanlab.calls == [
        ("init", (), init),
        ("log", ({"loss": 2.0},), {"step": 5}),
        ("finish", (), {}),
    ]


def test_mlflow_gets_a_run_in_a_database_of_its_own(mlflow: FakeService, output_dir: Path) -> None:
    (reporter,) = open_reporters(["mlflow"], output_dir, OPTIONS | {"long": "x" * 900}, resumed_step=4)
    reporter.log(5, {"loss": 2.0})
    reporter.close()
    params = {"learning_rate": "0.001", "dataset": "['a.jsonl']", "system": "None", "long": "x" * 500}
    assert mlflow.calls == [
        ("set_tracking_uri", (f"sqlite:///{output_dir}/mlflow.db",), {}),
        ("set_experiment", ("braid",), {}),
        ("start_run", (), {"run_name": "my-run"}),
        ("log_params", (params,), {}),
        ("log_metrics", ({"loss": 2.0},), {"step": 5}),
        ("end_run", (), {}),
    ]


def test_the_environment_names_project_and_server(
    wandb: FakeService,
    swanlab: FakeService,
    mlflow: FakeService,
    output_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "wandb-project")
    monkeypatch.setenv("SWANLAB_PROJ_NAME", "swanlab-project")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mlflow-experiment")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")  # mlflow reads it by itself
    open_reporters(["wandb", "swanlab", "mlflow"], output_dir, OPTIONS, resumed_step=0)
    assert wandb.called("init")[0]["project"] == "wandb-project"
    assert swanlab.called("init")[0]["project"] == "swanlab-project"
    assert mlflow.calls[0] == ("set_experiment", ("mlflow-experiment",), {})


def test_the_name_is_that_of_the_directory_behind_a_relative_path(
    wandb: FakeService, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(output_dir)
    Wandb(Path("."), OPTIONS, 0)
    assert wandb.called("init")[0]["name"] == "my-run"


def test_reporters_stand_in_the_order_asked_for(
    swanlab: FakeService, mlflow: FakeService, output_dir: Path
) -> None:
    for names, classes in (
        (["swanlab", "mlflow"], [SwanLab, MLflow]),
        (["mlflow", "swanlab"], [MLflow, SwanLab]),
    ):
        reporters = open_reporters(names, output_dir, OPTIONS, resumed_step=0)
        assert [type(reporter) for reporter in reporters] == classes
    assert open_reporters(["none"], output_dir, OPTIONS, resumed_step=0) == []
    assert open_reporters([], output_dir, OPTIONS, resumed_step=0) == []


def scalars(output_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard would draw them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "runs"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(output_dir: Path) -> None:
    (reporter,) = open_reporters(["tensorboard"], output_dir, OPTIONS, resumed_step=0)
    for step in (1, 2, 3, 4):
        reporter.log(step, {"loss": float(step), "lr": 0.5})
    reporter.close()
    assert scalars(output_dir, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    # TensorBoard reads event files by name, and the names begin with the second they were made in.
    (first,) = (output_dir / "runs").iterdir()
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))
    (reporter,) = open_reporters(["tensorboard"], output_dir, OPTIONS, resumed_step=2)
    reporter.log(3, {"loss": 30.0})
    reporter.close()
    assert scalars(output_dir, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars(output_dir, "lr") == [(1, 0.5), (2, 0.5)]


def a_log(
    output_dir: Path, *, resumed_step: int = 0, report_to: tuple[str, ...] = (), enabled: bool = True
) -> MetricsLog:
    return MetricsLog(
        output_dir, report_to=report_to, options=OPTIONS, resumed_step=resumed_step, enabled=enabled
    )


def written(output_dir: Path) -> list[dict[str, Any]]:
    text = (output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


RECORDS = [
    {"step": 1, "loss": 3.0, "grad_norm": None},
    {"step": 2, "loss": 2.5, "grad_norm": 0.5},
    {"step": 2, "eval_loss": 2.75},
    {"step": 3, "loss": 2.0, "grad_norm": 0.5},
    {"step": 3, "eval_loss": 2.25},
]


def test_metrics_are_one_object_a_line_and_there_at_once(output_dir: Path) -> None:
    log = a_log(output_dir)
    for number, record in enumerate(RECORDS, start=1):
        log.write(record)
        assert written(output_dir) == RECORDS[:number]
    log.close()


@pytest.mark.parametrize(("resumed_step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 5)])
def test_a_resumed_run_keeps_what_its_checkpoint_had_seen(
    resumed_step: int, kept: int, output_dir: Path
) -> None:
    log = a_log(output_dir)
    for record in RECORDS:
        log.write(record)
    log.close()
    log = a_log(output_dir, resumed_step=resumed_step)
    new = {"step": resumed_step + 1, "loss": 7.0}
    log.write(new)
    log.close()
    assert written(output_dir) == [*RECORDS[:kept], new]


def test_the_torn_last_line_of_a_killed_run_is_dropped(output_dir: Path) -> None:
    whole = json.dumps(RECORDS[0]) + "\n"
    (output_dir / "metrics.jsonl").write_text(whole + '{"step": 2, "lo', encoding="utf-8")
    log = a_log(output_dir, resumed_step=2)
    log.write(RECORDS[3])
    log.close()
    assert written(output_dir) == [RECORDS[0], RECORDS[3]]


def test_other_ranks_write_nothing(wandb: FakeService, output_dir: Path) -> None:
    log = a_log(output_dir, report_to=("wandb", "tensorboard"), enabled=False)
    log.write(RECORDS[0])
    log.close()
    assert list(output_dir.iterdir()) == []
    assert wandb.calls == []


def test_reporters_get_the_numbers_of_a_record(swanlab: FakeService, output_dir: Path) -> None:
    log = a_log(output_dir, report_to=("swanlab",))
    for record in RECORDS[:3]:
        log.write(record)
    log.close()
    assert swanlab.calls[1:] == [
        ("log", ({"loss": 3.0},), {"step": 1}),  # a norm that is not known is no number
        ("log", ({"loss": 2.5, "grad_norm": 0.5},), {"step": 2}),
        ("log", ({"eval_loss": 2.75},), {"step": 2}),
        ("finish", (), {}),
    ]


def test_every_number_of_a_list_is_a_curve(output_dir: Path) -> None:
    log = a_log(output_dir, report_to=("tensorboard",))
    record = {"step": 1, "dropped_tokens": 4, "tokens_per_expert": [30, 12]}
    log.write(record)
    log.close()
    assert written(output_dir) == [record]
    assert scalars(output_dir, "dropped_tokens") == [(1, 4.0)]
    assert scalars(output_dir, "tokens_per_expert/0") == [(1, 30.0)]
    assert scalars(output_dir, "tokens_per_expert/1") == [(1, 12.0)]
