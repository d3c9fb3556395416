"""`braid sft` for real: what a run leaves, how it goes on from a checkpoint, the launcher with two ranks."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config.options import SftConfig
from engine.config.parse import flatten, parse
from launch.cli import main
from launch.tiny import build_tiny_qwen3
from tests.launch.runs import Run, braid, everything_in, question_rows, read_jsonl, write_rows

TRAIN_KEYS = {
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "tflops_per_gpu", "mfu", "mem_gib",
    "elapsed_s", "eta_s", "data_wait_s", "skipped_steps",
}  # fmt: skip
EVAL_KEYS = {"step", "eval_loss", "eval_perplexity", "eval_tokens"}
SETTINGS = (
    "--device", "cpu", "--max_length", "128", "--split_dataset_ratio", "0.25", "--global_batch_size", "2",
    "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--save_steps", "1",
    "--save_total_limit", "1", "--report_to", "none",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run, the words that made it, and its output directory, which nobody changes."""

    run: Run
    words: list[str]
    out: Path


def settings(model: Path, directory: Path) -> list[str]:
    data = write_rows(directory / "data.jsonl", question_rows())
    return ["sft", "--model", str(model), "--dataset", str(data), *SETTINGS]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """8 rows, 2 of them held out; 3 steps of 2 rows."""
    directory = tmp_path_factory.mktemp("sft")
    words, out = settings(tiny_model, directory), directory / "out"
    return Trained(
        run=braid(*words, "--max_steps", "3", "--output_dir", str(out), cache=cache), words=words, out=out
    )


@pytest.fixture(scope="module")
def continued(trained: Trained, cache: Path) -> Trained:
    """The same command with two steps more, over a copy of the run's directory."""
    assert trained.run.code == 0, trained.run.stderr
    out = trained.out.with_name("continued")
    shutil.copytree(trained.out, out)
    words = ["--max_steps", "5", "--output_dir", str(out), "--resume_from_checkpoint", "auto"]
    return Trained(run=braid(*trained.words, *words, cache=cache), words=trained.words, out=out)


def steps_of(records: list[dict[str, Any]], kind: str) -> list[int]:
    return [record["step"] for record in records if kind in record]


def test_a_run_succeeds_in_silence_on_stderr(trained: Trained) -> None:
    assert trained.run.code == 0, trained.run.stderr
    assert trained.run.stderr == ""
    assert trained.run.left_running == ()
    assert "1 ranks = TP 1 x PP 1 x CP 1 x DP 1" in trained.run.stdout
    assert "step 3/3" in trained.run.stdout


def test_a_run_leaves_what_the_contract_says(trained: Trained) -> None:
    assert {path.name for path in trained.out.iterdir()} >= {
        "args.yaml",
        "metrics.jsonl",
        "checkpoint-3",
        "hf",
        "loss.png",
        "README.md",
    }
    assert (trained.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (trained.out / "README.md").read_text(encoding="utf-8")
    for part in (
        "base_model:",
        "braid sft",
        "Training loss",
        "Evaluation loss",
        "from_pretrained",
        "megatron-core",
    ):
        assert part in card, part
    assert [path.name for path in trained.out.glob("*checkpoint*")] == ["checkpoint-3"]
    assert not [path for path in everything_in(trained.out) if "partial" in path]


def test_metrics_have_the_keys_of_the_contract(trained: Trained) -> None:
    records = read_jsonl(trained.out / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    evaluation = [record for record in records if "eval_loss" in record]
    assert len(training) + len(evaluation) == len(records)
    assert [record["step"] for record in training] == [1, 2, 3]
    assert [record["step"] for record in evaluation] == [3]
    assert all(record.keys() == TRAIN_KEYS for record in training)
    assert all(record.keys() == EVAL_KEYS for record in evaluation)
    assert all(record["mfu"] is None for record in training)  # the peak of a CPU is not known
    assert all(record["data_wait_s"] >= 0 for record in training)
    assert all(record["lr"] == 1e-2 for record in training)
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in training)
    tokens = [record["tokens"] for record in training]
    assert tokens == sorted(set(tokens))
    assert training[-1]["loss"] < training[0]["loss"]


def test_the_export_loads_in_transformers_and_has_learned(trained: Trained, tiny_model: Path) -> None:
    exported = trained.out / "hf"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer("What is the capital of France?", return_tensors="pt")
    logits = []
    for directory in (tiny_model, exported):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(model(inputs["input_ids"]).logits)
    assert torch.isfinite(logits[1]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    before, after = load_file(tiny_model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == before.keys(), "full training changes every weight"


def test_the_checkpoint_is_the_export(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    verify = ["verify", "--model", str(trained.out / "hf"), "--checkpoint", str(trained.out / "checkpoint-3")]
    assert main(verify) == 0
    assert "same model" in capsys.readouterr().out


def test_args_yaml_is_the_configuration(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained.out / "args.yaml"
    text = path.read_text(encoding="utf-8")
    assert "# git_revision:" in text
    assert "#   torch: " in text
    written = yaml.safe_load(text)
    assert written.keys() == flatten(SftConfig()).keys()
    wanted, _ = parse(SftConfig, [*trained.words[1:], "--max_steps", "3", "--output_dir", str(trained.out)])
    assert written == flatten(wanted) | {"nproc_per_node": 1, "nnodes": 1}
    again = tmp_path / "again"
    assert main(["sft", "--config", str(path), "--output_dir", str(again), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed.split("\nmodel: ")[0])
    assert shown == written | {"output_dir": str(again), "dry_run": True}
    assert "3 steps" in printed
    assert not again.exists()


def test_a_resumed_run_goes_on(continued: Trained, trained: Trained) -> None:
    assert continued.run.code == 0, continued.run.stderr
    assert continued.run.stderr == ""
    assert "resuming from" in continued.run.stdout
    records = read_jsonl(continued.out / "metrics.jsonl")
    assert steps_of(records, "loss") == [1, 2, 3, 4, 5]
    assert steps_of(records, "eval_loss") == [3, 5]
    earlier = read_jsonl(trained.out / "metrics.jsonl")
    assert records[: len(earlier)] == earlier
    assert records[len(earlier)]["tokens"] > earlier[-2]["tokens"]
    assert [path.name for path in continued.out.glob("*checkpoint*")] == ["checkpoint-5"]


def test_a_resumed_run_exports_anew(continued: Trained, trained: Trained) -> None:
    before = load_file(trained.out / "hf" / "model.safetensors")
    after = load_file(continued.out / "hf" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    compare = [
        "verify",
        "--model",
        str(continued.out / "hf"),
        "--checkpoint",
        str(continued.out / "checkpoint-5"),
    ]
    assert main(compare) == 0


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda c: (c / "__0_0.distcp").unlink(), ("__0_0.distcp: the file is missing",)),
        (lambda c: os.truncate(c / "__0_0.distcp", 1000), ("__0_0.distcp: the file has 1000 bytes of",)),
        (lambda c: (c / ".metadata").write_bytes(b"rubbish"), (".metadata: the file has 7 bytes of",)),
        (lambda c: (c / "trainer_state.json").unlink(), ("trainer_state.json: the file is missing",)),
        (lambda c: (c / "braid-manifest.json").write_text("{"), ("braid-manifest.json is damaged",)),
        (lambda c: (c / "braid-manifest.json").unlink(), ("has no braid-manifest.json",)),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    named: tuple[str, ...],
) -> None:
    """Before two ranks would start, where no other checkpoint is left."""
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    damage(out / "checkpoint-3")
    before = everything_in(out)
    words = [*trained.words, "--max_steps", "5", "--output_dir", str(out), "--nproc_per_node", "2"]
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    assert printed.startswith("braid sft: error")
    assert all(part in printed for part in ("checkpoint-3", *named))
    assert everything_in(out) == before


def test_a_checkpoint_of_another_model_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_tiny_qwen3(
        tmp_path / "other", hidden_size=32, intermediate_size=96, num_hidden_layers=2, head_dim=8
    )
    capsys.readouterr()
    words = [
        *trained.words,
        "--model",
        str(other),
        "--output_dir",
        str(tmp_path / "out"),
        "--nproc_per_node",
        "2",
    ]
    assert main([*words, "--resume_from_checkpoint", str(trained.out / "checkpoint-3")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    assert "checkpoint-3: weight decoder.layers.0.mlp.linear_fc1.weight has shape [128, 32]" in printed
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("two")
    words, out = settings(tiny_model, directory), directory / "out"
    layout = ["--tensor_model_parallel_size", "2", "--max_steps", "3", "--output_dir", str(out)]
    return Trained(run=braid(*words, *layout, cache=cache, NPROC_PER_NODE="2"), words=words, out=out)


def test_two_ranks_through_the_launcher(two_ranks: Trained) -> None:
    assert two_ranks.run.code == 0, two_ranks.run.stderr
    assert two_ranks.run.stderr == ""
    assert two_ranks.run.left_running == ()
    assert "2 ranks = TP 2 x PP 1 x CP 1 x DP 1, sequence parallel on" in two_ranks.run.stdout
    assert two_ranks.run.stdout.count("step 3/3") == 1, "one rank speaks"
    written = yaml.safe_load((two_ranks.out / "args.yaml").read_text(encoding="utf-8"))
    assert (written["nproc_per_node"], written["nnodes"]) == (2, 1)


def test_two_ranks_train_the_same_model_as_one(two_ranks: Trained, trained: Trained) -> None:
    one, two = (read_jsonl(run.out / "metrics.jsonl") for run in (trained, two_ranks))
    assert [record.keys() for record in one] == [record.keys() for record in two]
    for key in ("loss", "eval_loss", "grad_norm"):
        assert [r[key] for r in two if key in r] == pytest.approx([r[key] for r in one if key in r], rel=1e-4)
    assert [r.get("tokens") for r in two] == [r.get("tokens") for r in one]
    assert load_file(one_file(two_ranks)).keys() == load_file(one_file(trained)).keys()


def one_file(run: Trained) -> Path:
    return run.out / "hf" / "model.safetensors"


def test_a_run_goes_on_under_another_layout(two_ranks: Trained, continued: Trained, cache: Path) -> None:
    """One rank takes the checkpoint of two where they stopped; the next step is what it would have been."""
    assert two_ranks.run.code == 0, two_ranks.run.stderr
    out = two_ranks.out.with_name("by_one")
    words = [*two_ranks.words, "--max_steps", "4", "--output_dir", str(out)]
    run = braid(*words, "--resume_from_checkpoint", str(two_ranks.out / "checkpoint-3"), cache=cache)
    assert run.code == 0, run.stderr
    records = read_jsonl(out / "metrics.jsonl")
    assert steps_of(records, "loss") == [4]
    (wanted,) = [r for r in read_jsonl(continued.out / "metrics.jsonl") if r["step"] == 4]
    assert records[0]["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert records[0]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert records[0]["tokens"] == wanted["tokens"]


@pytest.mark.parametrize("stop_by", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_its_ranks(
    tiny_model: Path, cache: Path, tmp_path: Path, stop_by: signal.Signals
) -> None:
    words = [*settings(tiny_model, tmp_path), "--output_dir", str(tmp_path / "out"), "--max_steps", "100000"]
    run = braid(*words, "--nproc_per_node", "2", cache=cache, stop_by=stop_by)
    assert run.code == 128 + stop_by
    assert run.stderr == f"braid sft: stopped by {stop_by.name}\n"
    assert run.left_running == ()
