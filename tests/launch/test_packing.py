"""`braid sft --packing`: fewer steps over the same tokens, the same loss, and a resumed run stays packed."""

import re
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.launch.runs import Run, braid, question_rows, read_jsonl, write_rows

SETTINGS = (
    "--device", "cpu", "--max_length", "128", "--split_dataset_ratio", "0.25", "--global_batch_size", "1",
    "--learning_rate", "0", "--weight_decay", "0", "--report_to", "none",
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """8 rows, 2 of them held out."""
    data = write_rows(tmp_path_factory.mktemp("packing") / "data.jsonl", question_rows())
    return ["sft", "--model", str(tiny_model), "--dataset", str(data), *SETTINGS]


@pytest.fixture(scope="module")
def runs(words: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An epoch at learning rate 0, packed and not: (finished command, output directory)."""
    found = {}
    for name, extra in (("packed", ["--packing"]), ("plain", [])):
        out = tmp_path_factory.mktemp(name) / "out"
        found[name] = (braid(*words, *extra, "--output_dir", str(out), cache=cache), out)
    return found


@pytest.fixture
def packed(runs: dict[str, Any]) -> tuple[Run, Path]:
    run, out = runs["packed"]
    assert run.code == 0, run.stderr
    return run, out


@pytest.fixture
def plain(runs: dict[str, Any]) -> tuple[Run, Path]:
    run, out = runs["plain"]
    assert run.code == 0, run.stderr
    return run, out


def packing_line(stdout: str) -> str:
    (line,) = [line for line in stdout.splitlines() if re.match(r"packing: \d", line)]
    return line


def test_a_packed_run_says_so_and_takes_fewer_steps(
    packed: tuple[Run, Path], plain: tuple[Run, Path]
) -> None:
    run, out = packed
    assert run.stderr == ""
    line = packing_line(run.stdout)
    assert line.startswith("packing: 6 sequences -> 2 packs of 128 tokens, ")
    assert "% full; attention work of the heaviest micro-batch 1.00 x the mean (" in line
    assert "2 packs, global batch 1" in run.stdout
    assert "packing:" not in plain[0].stdout
    records = [
        [record for record in read_jsonl(directory / "metrics.jsonl") if "loss" in record]
        for directory in (out, plain[1])
    ]
    assert [len(each) for each in records] == [2, 6]
    assert records[0][-1]["tokens"] == records[1][-1]["tokens"], "the same rows"
    assert all(record["data_wait_s"] >= 0 for each in records for record in each)
    assert "| packing | True |" in (out / "README.md").read_text(encoding="utf-8")


def test_packs_have_the_loss_of_their_rows(packed: tuple[Run, Path], plain: tuple[Run, Path]) -> None:
    """Evaluation is packed too. With a learning rate of 0 both runs evaluate the same weights."""
    evaluations = [
        [record for record in read_jsonl(directory / "metrics.jsonl") if "eval_loss" in record][-1]
        for directory in (packed[1], plain[1])
    ]
    assert evaluations[0]["eval_tokens"] == evaluations[1]["eval_tokens"]
    assert evaluations[0]["eval_loss"] == pytest.approx(evaluations[1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("start", ["packed", "plain"])
def test_a_run_does_not_go_on_otherwise_packed(
    runs: dict[str, Any], words: list[str], cache: Path, tmp_path: Path, start: str
) -> None:
    run, out = runs[start]
    assert run.code == 0, run.stderr
    (checkpoint,) = out.glob("checkpoint-*")
    extra = [] if start == "packed" else ["--packing"]
    resumed = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint)]
    refused = braid(*words, *extra, *resumed, "--max_steps", "8", cache=cache)
    assert refused.code == 2, refused.stdout + refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert "belongs to a run with another number of sequences" in refused.stderr
    assert "packing" in refused.stderr


def test_dry_run_packs(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--packing", "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert packing_line(printed).startswith("packing: 6 sequences -> 2 packs of 128 tokens, ")
    assert "2 steps per epoch, 1 epochs, 2 steps" in printed
