"""What a run does when it is asked to stop, when values are not numbers, and when a rank dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch.runs import ROOT, braid, question_rows, read_jsonl, write_rows

SETTINGS = (
    "--device", "cpu", "--max_length", "64", "--global_batch_size", "2", "--learning_rate", "1e-2",
    "--save_steps", "1", "--save_total_limit", "2", "--report_to", "none",
)  # fmt: skip


def words(model: Path, directory: Path, *more: str) -> list[str]:
    data = write_rows(directory / "data.jsonl", question_rows())
    return [
        "sft",
        "--model",
        str(model),
        "--dataset",
        str(data),
        *SETTINGS,
        "--output_dir",
        str(directory / "out"),
        *more,
    ]


def start(command: list[str], cache: Path, **environment: str) -> subprocess.Popen[str]:
    env = os.environ | {"BRAID_CACHE": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *command],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        if any(int(path.name.removeprefix("checkpoint-")) >= step for path in out.glob("checkpoint-*")):
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    ("number", "ranks", "more"),
    [(signal.SIGTERM, 2, ()), (signal.SIGUSR1, 1, ()), (signal.SIGTERM, 2, ("--fsdp", "full_shard"))],
)
def test_a_run_that_is_asked_to_stop_saves_and_can_go_on(
    tiny_model: Path, cache: Path, tmp_path: Path, number: signal.Signals, ranks: int, more: tuple[str, ...]
) -> None:
    command, out = words(tiny_model, tmp_path, "--max_steps", "100000", *more), tmp_path / "out"
    process = start([*command, "--nproc_per_node", str(ranks)], cache)
    wait_for_step(process, out, 2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 75, stderr
    (line,) = stderr.splitlines()
    assert "go on with --resume_from_checkpoint auto" in line
    last = max(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    assert f"saved checkpoint-{last}" in line
    assert not (out / "hf").exists()
    again = braid(
        *words(tiny_model, tmp_path, "--max_steps", str(last + 1)),
        "--resume_from_checkpoint",
        "auto",
        cache=cache,
    )
    assert again.code == 0, again.stderr
    assert f"resuming from {out / f'checkpoint-{last}'}" in again.stdout
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl")] == list(range(1, last + 2))


def test_ranks_are_started_again_and_go_on(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    command, out = words(tiny_model, tmp_path, "--max_steps", "14", "--max_restarts", "2"), tmp_path / "out"
    process = start([*command, "--nproc_per_node", "2"], cache)
    wait_for_step(process, out, 2)
    ranks = [
        child
        for child in psutil.Process(process.pid).children()
        if "launch.cli" in child.cmdline() and "sft" in child.cmdline()
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "restart 1 after" in stderr
    assert stdout.count("resuming from") == 1
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl")] == list(range(1, 15))
    assert (out / "hf" / "model.safetensors").is_file()


def test_a_mistake_is_not_tried_again(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    command = words(tiny_model, tmp_path, "--max_restarts", "-1")
    run = braid(*command, cache=cache)
    assert run.code == 2
    assert "max_restarts must not be negative" in run.stderr


def poison(model: Path, value: float) -> None:
    """A weight of the last layer is not a number."""
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_tensor(
    model: Path, cache: Path, tmp_path: Path, stage: str
) -> None:
    poison(model, float("nan"))
    command = words(model, tmp_path, "--max_steps", "3", "--deepspeed", stage)
    run = braid(*command, cache=cache, NPROC_PER_NODE="2")
    assert run.code == 1
    (line,) = run.stderr.splitlines()
    assert "step 1: loss nan" in line
    assert "rank 0: " in line
    assert "--nonfinite skip" in line
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("more", [(), ("--deepspeed", "zero3", "--nproc_per_node", "2")])
def test_skipping_leaves_the_weights_alone_and_counts(
    model: Path, cache: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    poison(model, float("nan"))
    run = braid(*words(model, tmp_path, "--max_steps", "3", "--nonfinite", "skip", *more), cache=cache)
    assert run.code == 0, run.stderr
    records = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [1, 2, 3]
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "out" / "hf" / "model.safetensors"),
    )
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(7.0).float(), after[name].nan_to_num(7.0).float()), name


def test_exports_beside_training(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    run = braid(*words(tiny_model, tmp_path, "--max_steps", "4", "--export_steps", "2"), cache=cache)
    assert run.code == 0, run.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.glob("hf-*")} == {"hf-2", "hf-4"}
    last, export = (load_file(out / name / "model.safetensors") for name in ("hf", "hf-4"))
    assert all(torch.equal(last[name], export[name]) for name in last)
    assert not torch.equal(
        load_file(out / "hf-2" / "model.safetensors")["model.norm.weight"], last["model.norm.weight"]
    )


def test_other_data_are_refused_unless_forced(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    first = braid(*words(tiny_model, tmp_path, "--max_steps", "2"), cache=cache)
    assert first.code == 0, first.stderr
    other = words(tiny_model, tmp_path, "--max_steps", "4", "--resume_from_checkpoint", "auto")
    write_rows(tmp_path / "data.jsonl", question_rows()[:6])
    refused = braid(*other, cache=cache)
    assert refused.code == 2
    assert "another" in refused.stderr
    forced = braid(*other, "--force_resume", cache=cache)
    assert forced.code == 0, forced.stderr
    assert [record["step"] for record in read_jsonl(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_newest_whole_checkpoint_is_taken(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    first = braid(*words(tiny_model, tmp_path, "--max_steps", "3"), cache=cache)
    assert first.code == 0, first.stderr
    out = tmp_path / "out"
    shard = next((out / "checkpoint-3").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # the size stays
    shard.write_bytes(content)
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-9")
    (out / "checkpoint-9" / "braid-manifest.json").write_text("{}")
    # What is read before the shards are hashed, with a bit flipped.
    for step, name in ((7, ".metadata"), (8, "trainer_state.json")):
        shutil.copytree(out / "checkpoint-2", out / f"checkpoint-{step}")
        file = out / f"checkpoint-{step}" / name
        file.write_bytes(bytes((file.read_bytes()[0] ^ 1,)) + file.read_bytes()[1:])
    more = words(tiny_model, tmp_path, "--max_steps", "4", "--resume_from_checkpoint")
    run = braid(*more, "auto", cache=cache)
    assert run.code == 0, run.stderr
    assert f"resuming from {out / 'checkpoint-2'}" in run.stdout
    passed = [line for line in run.stdout.splitlines() if "over" in line and "passing" in line]
    assert len(passed) == 4
    for step, name in enumerate((".metadata", "trainer_state.json", "braid-manifest.json"), start=7):
        assert f"checkpoint-{step}/{name}" in passed[step - 7]
    assert f"{shard}: the content is not what was written" in passed[3]


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    first = braid(*words(tiny_model, tmp_path, "--max_steps", "2"), cache=cache)
    assert first.code == 0, first.stderr
    named = tmp_path / "out" / "checkpoint-2"
    shard = next(named.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    run = braid(
        *words(tiny_model, tmp_path, "--max_steps", "3", "--resume_from_checkpoint", str(named)), cache=cache
    )
    assert run.code == 2
    assert "the content is not what was written" in run.stderr
    assert run.stderr.count("\n") == 1


def test_faults(tmp_path: Path) -> None:
    """The short series of `make faults`: each kind at least once."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults", "--count", "20", "--report", str(report)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(report.read_text())
    assert sum(outcome["hit"] for outcome in outcomes) >= 20
    assert len({outcome["fault"] for outcome in outcomes}) == 16
