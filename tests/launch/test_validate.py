"""`braid validate`: what is looked at, what the report concludes, and a run on two CPU processes."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from engine.config.batch import resolve_batch_shape
from engine.config.options import BatchOptions, SftConfig
from engine.config.parallel import ParallelLayout
from engine.config.parse import parse
from engine.model.spec import model_spec_from_config
from launch.blueprint import lay_out
from launch.cli import main
from launch.validate import comm, conductor, curves, parity, speed
from launch.validate.conductor import Clock
from launch.validate.efficiency import ideal_bubble, measured_bubble, ratio
from launch.validate.layouts import ONE, Layout, data_parallel, layouts_of
from launch.validate.models import _config
from launch.validate.options import Bounds, ValidateConfig, check
from launch.validate.tasks import Failure, Setup, Task
from launch.validate.verdict import largest
from tests.launch.runs import ROOT, Run, assert_one_line, braid

MACHINES = (2, 4, 8)
WANTED = {
    2: {"TP2", "PP2", "PP2xVPP2", "CP2-all_gather", "CP2-a2a", "DP2", "ZeRO2xDP2", "FSDP2", "EP2", "EP2xTP2"},
    4: {"TP4", "TP2xDP2", "TP2xPP2", "PP2xVPP2xDP2", "CP2xTP2", "DP4", "FSDP4", "EP4", "EP2xETP2xTP2"},
    8: {"TP8", "TP4xDP2", "TP2xPP2xDP2", "PP4xVPP2xDP2", "CP2xTP2xDP2", "EP8", "EP4xTP2", "FSDP8", "DP8"},
}
WORDS = (
    "--device", "cpu", "--layouts", "PP2", "--steps", "10", "--shape", "tiny", "--max_length", "32",
    "--accumulation", "2", "--bench_steps", "1", "--comm_sizes", "64KiB",
)  # fmt: skip


def setup_of(root: Path, *words: str, ranks: int = 2) -> Setup:
    given = ["--output_dir", str(root), "--device", "cpu", "--shape", "tiny", *words]
    config, _ = parse(ValidateConfig, given)
    check(config)
    return Setup(config=config, ranks=ranks, on_cpu=True)


@pytest.mark.parametrize("ranks", MACHINES)
def test_a_machine_has_its_layouts(ranks: int) -> None:
    layouts = layouts_of(ranks)
    assert {layout.name for layout in layouts} >= WANTED[ranks]
    assert len({layout.name for layout in layouts}) == len(layouts)
    assert all(layout.ranks == ranks for layout in layouts)


@pytest.mark.parametrize(
    ("ranks", "layout"), [(ranks, layout) for ranks in MACHINES for layout in layouts_of(ranks)],
    ids=lambda case: case.name if isinstance(case, Layout) else str(case),
)  # fmt: skip
def test_a_layout_is_what_its_name_says_and_fits_the_small_models(
    ranks: int, layout: Layout, tmp_path: Path
) -> None:
    setup = setup_of(tmp_path, ranks=ranks)
    for model in ("qwen3-moe",) if layout.experts else ("qwen2.5", "qwen3"):
        config = _config(model, layers=setup.layers, vocabulary=2048, on_cpu=False).to_dict()
        config["architectures"] = [
            {"qwen2.5": "Qwen2", "qwen3": "Qwen3", "qwen3-moe": "Qwen3Moe"}[model] + "ForCausalLM"
        ]
        spec = model_spec_from_config(config, where=model)
        options = SftConfig(parallel=layout.parallel(), optimizer=layout.optimizer())
        drawn = lay_out(options, spec, ranks)
        drawn.check_micro_batches(setup.micro_batches // drawn.dp)
        batch = BatchOptions(global_batch_size=setup.micro_batches)
        assert resolve_batch_shape(batch, data_parallel_size=drawn.dp).accumulation >= 1
        assert_named(layout.name, drawn, options.optimizer.data_parallel_sharding_strategy)


def assert_named(name: str, layout: ParallelLayout, sharding: str | None) -> None:
    """`EP4xTP2` has EP 4 and TP 2, and no degree that it does not name."""
    parts = name.partition("-")[0].split("x")
    named = {part.rstrip("0123456789"): int(part[len(part.rstrip("0123456789")) :]) for part in parts}
    sharded = {"optim_grads": "ZeRO2", "optim_grads_params": "FSDP"}.get(sharding or "")
    for degree in ("tp", "pp", "vpp", "cp", "ep", "etp"):
        assert getattr(layout, degree) == named.get(degree.upper(), 1), degree
    if "DP" in named or "FSDP" in named:
        assert layout.dp == named.get("DP", named.get("FSDP"))
    assert ("FSDP" in named) == (sharded == "FSDP")
    assert ("ZeRO2" in name) == (sharded == "ZeRO2")


def test_a_pipeline_without_overhead_has_the_ideal_bubble() -> None:
    for stages, chunks in ((2, 1), (4, 1), (4, 2)):
        each, update = 0.3, 0.7

        def step(count: int, stages: int = stages, chunks: int = chunks) -> float:
            return (count + (stages - 1) / chunks) * 0.3 + 0.7

        found = measured_bubble(
            seconds=step(8),
            micro_batches=8,
            long_seconds=step(32),
            long_micro_batches=32,
            update_seconds=update,
        )
        assert each > 0
        assert found == pytest.approx(ideal_bubble(stages, 8, chunks))
    assert ideal_bubble(4, 8) == pytest.approx(3 / 11)
    assert ideal_bubble(4, 8, 2) == pytest.approx(3 / 19)


def test_times_that_say_nothing_have_no_bubble() -> None:
    times = {"seconds": 2.0, "micro_batches": 8, "long_micro_batches": 32}
    assert measured_bubble(**times, long_seconds=1.9, update_seconds=0.1) is None  # type: ignore[arg-type]
    assert measured_bubble(**times, long_seconds=8.0, update_seconds=2.0) is None  # type: ignore[arg-type]


def test_an_efficiency_needs_both_numbers() -> None:
    assert ratio(90.0, 100.0) == pytest.approx(0.9)
    assert ratio(None, 100.0) is None
    assert ratio(90.0, None) is None


def test_what_is_no_number_is_the_largest() -> None:
    assert largest([1.0, float("nan"), 2.0]) != largest([1.0, 2.0])


def test_noise_is_that_of_one_gpu_and_has_a_floor(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "--noise_factor", "3", "--curve_floor", "0.001")
    exact = [2.0] * 20
    assert curves.noise_bounds(setup, exact, exact) == (0.002, 0.001)
    # Of the ten steps of the second half two and two are averaged: one pair is off by 3 %, one by 4 %.
    noisy = [2.4] + [2.0] * 11 + [2.12, 2.0] + [2.0] * 4 + [2.08] * 2
    assert curves.noise_bounds(setup, noisy, exact) == (
        pytest.approx(0.6),
        pytest.approx(3 * sqrt((0.03**2 + 0.04**2) / 5)),
    )


def test_parity_in_bf16_has_floors_and_knows_the_noise(tmp_path: Path) -> None:
    setup = setup_of(
        tmp_path, "--noise_factor", "2", "--bf16_loss_bound", "0.01", "--bf16_norm_bound", "0.03"
    )
    exact = {"losses": [2.0, 4.0], "grad_norms": [1.0, 1.0]}
    assert parity.noise_bounds(setup, exact, exact) == (0.01, 0.03)
    rounded = {"losses": [2.0, 4.4], "grad_norms": [0.8, 1.1]}
    assert parity.noise_bounds(setup, rounded, exact) == (pytest.approx(0.2), pytest.approx(0.4))


def test_a_curve_that_is_close_at_its_end_alone_is_found(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "--steps", "20")
    task = next(task for task in curves.tasks(setup) if task.name == "TP2")
    for one in curves.tasks(setup):
        off = [1.01] * 18 if one == task else [1.001] * 18
        setup.finish(one, {"losses": [2.0 * value for value in [*off, 1.0, 1.0]], "grad_norms": []})
    report = curves.judge(setup)
    failed = {(check.layout, check.name) for check in report.checks if check.state == "failed"}
    assert failed == {("TP2", "curve, any step"), ("TP2", "curve, second half")}


def test_experts_and_dense_layouts_have_their_own_models(tmp_path: Path) -> None:
    names = [task.name for task in parity.tasks(setup_of(tmp_path, "--layouts", "EP2,TP2"))]
    assert names == ["one-qwen2.5", "one-qwen3", "one-qwen3-moe", "TP2", "EP2"]
    names = [task.name for task in speed.tasks(setup_of(tmp_path, "--layouts", "EP2,PP2"))]
    assert names == ["tiny-one", "tiny-PP2", "tiny-DP2", "tiny-TP2", "tiny-PP2-long"]
    moe = setup_of(tmp_path, "--layouts", "EP2,PP2", "--shape", "tiny-moe", "--scaling_shape", "tiny")
    names = [task.name for task in speed.tasks(moe)]
    assert names == ["tiny-moe-one", "tiny-moe-EP2", "tiny-one", "tiny-DP2", "tiny-TP2"]


def test_a_kind_of_group_is_measured_once(tmp_path: Path) -> None:
    tasks = comm.tasks(setup_of(tmp_path, "--layouts", "TP2,CP2-a2a,CP2-all_gather,EP2xTP2"))
    assert [(task.name, task.variant) for task in tasks] == [
        ("TP2", "tp,world"), ("CP2-all_gather", "cp,dp_cp"), ("EP2xTP2", "ep"),
    ]  # fmt: skip


def test_a_layout_that_a_shape_does_not_have_does_not_fail(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "--shape", "qwen2.5-7b", "--scaling_shape", "tiny", ranks=8)
    refused = {task.name: speed.refusal(task, setup) for task in speed.tasks(setup)}
    assert {name for name, reason in refused.items() if reason} == {"qwen2.5-7b-TP8"}
    (found,) = (one for one in speed.judge(setup).checks if one.layout == "TP8")
    assert (found.state, "28" in found.note) == ("does not apply", True)


def blame(
    setup: Setup, tasks: list[Task], *, hung: str | None = None, code: int = 1, printed: str = "x"
) -> dict[str, Failure | None]:
    conductor._blame(setup, tasks, hung=hung, code=code, printed=printed)
    return {task.name: setup.failure(task) for task in tasks}


def test_a_task_under_which_a_crew_died_has_failed(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    tasks = [Task(part="parity", name=name, layout=ONE) for name in ("done", "running", "waiting")]
    for task in tasks[:2]:
        setup.begin(task)
    setup.finish(tasks[0], {})
    assert blame(setup, tasks, hung="late") == {"done": None, "running": None, "waiting": None}
    found = blame(setup, tasks, code=-9, printed="")
    assert found["running"] == Failure(message="the processes ended: exit code -9")
    assert found["done"] is found["waiting"] is None


def test_a_crew_that_starts_nothing_does_not_start_for_ever(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    tasks = [Task(part="parity", name=name, layout=ONE) for name in ("first", "second")]
    found = blame(setup, tasks, printed="braid validate: no such thing")
    assert found["first"] is not None
    assert found["second"] is None


def test_who_waited_for_one_that_failed_is_not_to_blame(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    tasks = [Task(part="parity", name=name, layout=ONE) for name in ("failed", "next")]
    for task in tasks:
        setup.begin(task)
    setup.fail(tasks[0], Failure(message="out of memory", oom=True))
    setup.fail(tasks[0], Failure(message="the others were ended"))
    assert blame(setup, tasks) == {"failed": Failure(message="out of memory", oom=True), "next": None}


def test_every_part_has_its_own_time() -> None:
    clock = Clock(seconds=10.0, spent={})
    clock.spend("parity", 4.0)
    clock.spend("parity", 7.0)
    assert clock.left("parity") < 0 < clock.left("curves")


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Run]:
    """Every part, of one layout."""
    root = tmp_path_factory.mktemp("validate") / "out"
    return root, braid("validate", "--output_dir", str(root), *WORDS, cache=cache, NPROC_PER_NODE="2")


def test_a_run_leaves_one_report(validated: tuple[Path, Run]) -> None:
    root, run = validated
    assert run.code == 0, run.stdout + run.stderr
    assert not run.left_running
    record = json.loads((root / "report.json").read_text(encoding="utf-8"))
    assert record["passed"]
    assert record["bounds"] == vars(Bounds())
    parts = record["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(
        ("doctor", "comm", "parity", "curves", "resume", "speed"), "passed"
    )
    checks = {(c["part"], c["layout"], c["name"]): c for part in parts.values() for c in part["checks"]}
    for model in ("qwen2.5", "qwen3"):
        loss, norm = (
            checks["parity", "PP2", f"{what}, {model} float32"] for what in ("loss", "gradient norm")
        )
        assert 0 <= loss["value"] <= loss["bound"] == 1e-5
        assert 0 <= norm["value"] <= norm["bound"] == 1e-4
    curve = checks["curves", "PP2", "curve, any step"]
    assert curve["value"] <= curve["bound"]
    losses = parts["curves"]["results"]
    assert len(losses["PP2"]) == len(losses["one-qwen2.5-bfloat16"]) == 10
    assert losses["PP2"][-1] < losses["PP2"][0]
    assert losses["one-qwen2.5-bfloat16"] != losses["one-qwen2.5-float32"]
    assert checks["resume", "PP2", "losses after resuming"]["value"] <= 1e-4
    groups = {one["group"] for one in parts["comm"]["results"]["PP2"]}
    assert groups == {"pp", "world"}
    results = parts["speed"]["results"]
    assert results["tiny-PP2-long"]["accumulation"] == 4 * results["tiny-PP2"]["accumulation"]
    one, two = (results[f"tiny-{name}"]["tokens_per_s_per_device"] for name in ("one", "DP2"))
    assert results["efficiency"]["weak scaling, tiny, DP 1 -> DP 2"] == pytest.approx(two / one)
    text = (root / "report.md").read_text(encoding="utf-8")
    assert "Every layout passed." in text
    assert "ideal 33.3 %" in text
    assert "The noise of bf16 is measured" in text
    assert (root / "report.png").read_bytes().startswith(b"\x89PNG")


def again(root: Path, *words: str) -> int:
    return main(["validate", "--output_dir", str(root), "--resume", *WORDS, "--nproc_per_node", "2", *words])


def times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("result.json")}


def spoil(root: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / name / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")


@pytest.fixture
def copy(validated: tuple[Path, Run], tmp_path: Path) -> Path:
    return Path(shutil.copytree(validated[0], tmp_path / "out"))


def failures(root: Path) -> set[tuple[str, str, str]]:
    parts = json.loads((root / "report.json").read_text(encoding="utf-8"))["parts"]
    checks = [check for part in parts.values() for check in part["checks"]]
    return {(c["part"], c["layout"], c["name"]) for c in checks if c["state"] != "passed"}


def test_results_are_kept_and_judged_again(copy: Path) -> None:
    """Nothing is run a second time; a bound that cannot be met is not met."""
    before = times(copy)
    parts = ("--parts", "parity,curves,resume")
    assert again(copy, *parts) == 0
    assert again(copy, *parts, "--fp32_norm_bound", "1e-12") == 1
    assert failures(copy) == {
        ("parity", "PP2", f"gradient norm, {model} float32") for model in ("qwen2.5", "qwen3")
    }
    assert "Not every layout passed." in (copy / "report.md").read_text(encoding="utf-8")
    assert times(copy) == before


def scale(values: list[float], factor: float) -> None:
    values[:] = [factor * value for value in values]


SPOILED: dict[str, tuple[str, Callable[[dict[str, Any]], None], set[tuple[str, str, str]]]] = {
    "a loss that is off by 1 %": (
        "parity/PP2",
        lambda result: scale(result["qwen3 bfloat16"]["losses"], 1.01),
        {("parity", "PP2", "loss, qwen3 bfloat16")},
    ),
    "a norm that is no number": (
        "parity/PP2",
        lambda result: result["qwen2.5 float32"]["grad_norms"].__setitem__(1, float("nan")),
        {("parity", "PP2", "gradient norm, qwen2.5 float32")},
    ),
    "a curve that drifts": (
        "curves/PP2",
        lambda result: result["losses"].__setitem__(-1, 1.5 * result["losses"][-1]),
        {("curves", "PP2", "curve, any step"), ("curves", "PP2", "curve, second half")},
    ),
    "a run that skipped a step": (
        "resume/PP2",
        lambda result: result["losses"].pop("16"),
        {("resume", "PP2", "losses after resuming")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_wrong_result_is_found(copy: Path, case: str) -> None:
    name, change, expected = SPOILED[case]
    spoil(copy, name, change)
    assert again(copy, "--parts", name.partition("/")[0]) == 1
    assert failures(copy) == expected


def test_a_layout_that_ran_out_of_memory_is_a_result(copy: Path) -> None:
    setup, task = setup_of(copy), Task(part="speed", name="tiny-PP2", layout=ONE)
    setup.forget(task)
    setup.fail(task, Failure(message="TrainingError: out of memory on the device", oom=True))
    assert again(copy, "--parts", "speed") == 1
    assert failures(copy) == {("speed", "PP2", "speed, tiny-PP2")}
    text = (copy / "report.md").read_text(encoding="utf-8")
    assert "out of memory on the device" in text
    assert "| bubble, tiny, PP2 | not measured |" in text


def test_a_part_of_earlier_calls_stays_in_the_report(copy: Path) -> None:
    """And what failed there still fails."""
    assert again(copy, "--parts", "doctor", "--fp32_norm_bound", "1e-12") == 1
    assert ("parity", "PP2", "gradient norm, qwen3 float32") in failures(copy)
    shutil.rmtree(copy / "curves")  # was not asked for, so it is not missed
    assert again(copy, "--parts", "doctor") == 0


def test_other_options_do_not_go_with_old_results(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(copy, "--steps", "11") == 2
    assert_one_line(capsys.readouterr().err, "validate", "steps was 10", "now 11")
    assert main(["validate", "--output_dir", str(copy), *WORDS, "--nproc_per_node", "2"]) == 2
    assert_one_line(capsys.readouterr().err, "validate", "is in use")


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no directory": (("--device", "cpu"), "pass --output_dir DIR"),
    "unknown part": (("--parts", "doctor,luck"), "part 'luck' is not known"),
    "unknown layout": (("--layouts", "TP3"), "layout 'TP3' is none of 2 processes"),
    "other processes": (("--nproc_per_node", "3"), "layouts are known for 2, 4, 8 processes, not for 3"),
    "too large": (("--shape", "qwen2.5-7b"), "is too large for a CPU"),
    "short curve": (("--steps", "5"), "steps must be at least 10"),
    "bound below nothing": (("--resume_bound", "-1"), "resume_bound must not be negative"),
    "half an option": (("--bench_options", "exp_avg_dtype"), "bench_options are name=value"),
    "unknown option": (("--bench_options", "exp=1"), "unknown option --exp"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = BAD[case]
    given = [] if case == "no directory" else ["--output_dir", str(tmp_path / "out")]
    defaults = ["--device", "cpu", "--nproc_per_node", "2", "--shape", "tiny"]
    assert main(["validate", *given, *defaults, *words]) == 2
    assert_one_line(capsys.readouterr().err, "validate", named)
    assert not (tmp_path / "out").exists()


def test_the_script_keeps_multicast_off(tmp_path: Path) -> None:
    (tmp_path / "braid").write_text('#!/bin/sh\nenv | grep -E "NVLS|MULTICAST" | sort\necho "$@"\n')
    (tmp_path / "braid").chmod(0o755)
    command = [str(ROOT / "launch" / "validate_cluster.sh"), "--output_dir", "a b"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        "NCCL_NVLS_ENABLE=0",
        "NVSHMEM_DISABLE_NVLS=1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST=1",
        "validate --output_dir a b",
    ]
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, "braid is not on PATH" in done.stderr) == (2, True)


def test_replicas_are_named_as_in_the_lists() -> None:
    for ranks in MACHINES:
        assert data_parallel(ranks) in layouts_of(ranks)
    assert replace(data_parallel(1)) == ONE


@pytest.mark.slow
def test_a_layout_that_fails_does_not_stop_the_others(
    validated: tuple[Path, Run], tmp_path: Path, cache: Path
) -> None:
    """EP2 ends the processes by its broken model; EP2xTP2 gets others."""
    root = tmp_path / "out"
    shutil.copytree(validated[0] / "models", root / "models")
    broken = root / "models" / "qwen3-moe"
    shutil.copytree(root / "models" / "qwen3", broken)
    words = [*WORDS, "--parts", "parity", "--layouts", "PP2,EP2,EP2xTP2", "--resume"]
    run = braid("validate", "--output_dir", str(root), *words, cache=cache, NPROC_PER_NODE="2")
    assert run.code == 1
    assert not run.left_running
    found = {(layout, name) for _, layout, name in failures(root)}
    assert found == {("EP2", "parity"), ("EP2xTP2", "parity")}
    assert "experts" in (root / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_call_that_is_ended_leaves_a_report_and_nothing_running(
    validated: tuple[Path, Run], tmp_path: Path, cache: Path
) -> None:
    root = tmp_path / "out"
    shutil.copytree(validated[0] / "models", root / "models")
    words = ["--output_dir", str(root), *WORDS, "--parts", "parity", "--resume"]
    run = braid("validate", *words, cache=cache, NPROC_PER_NODE="2", stop_by=signal.SIGTERM)
    assert run.code == 128 + signal.SIGTERM
    assert not run.left_running
    parts = json.loads((root / "report.json").read_text(encoding="utf-8"))["parts"]
    assert parts["parity"]["state"] == "not run"
