"""`braid inspect` as a user types it: where the path may stand, what is printed, and the exit code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from converters.convert import to_mcore
from converters.inspect import inspect_checkpoint
from launch.cli import main
from launch.inspect import size_text
from tests.launch.runs import ROOT, braid, everything_in, question_rows, write_rows
from tests.launch.test_sft import SETTINGS

FC1 = "decoder.layers.mlp.linear_fc1.weight"
RED = "[red]decoder.x[/red]"


@pytest.fixture(scope="module")
def converted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    directory = tmp_path_factory.mktemp("inspect") / "mcore"
    to_mcore(tiny_model, directory)
    return directory


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A copy to be damaged at will."""
    return Path(shutil.copytree(converted, tmp_path / "mcore"))


@pytest.fixture(scope="module")
def lora_run(tiny_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a LoRA run of one step under TP2; not to be changed."""
    root = tmp_path_factory.mktemp("lora")
    data = write_rows(root / "data.jsonl", question_rows())
    words = ["sft", "--model", str(tiny_model), "--dataset", str(data), *SETTINGS, "--max_steps", "1"]
    words += ["--train_type", "lora", "--lora_rank", "4", "--output_dir", str(root / "out")]
    run = braid(*words, "--tensor_model_parallel_size", "2", "--nproc_per_node", "2", cache=cache)
    assert run.code == 0, run.stderr
    return root / "out"


def rows_of(printed: str) -> list[list[str]]:
    """Cells of the rows of all tables."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    assert main(["inspect", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("braid inspect: error: ")
    for part in parts:
        assert part in printed.err


def test_tables_of_a_converted_checkpoint(
    converted: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(converted)
    assert main(["inspect", str(converted)]) == 0
    printed = capsys.readouterr().out
    assert everything_in(converted) == before
    assert "converted by braid" in printed
    assert "Qwen3ForCausalLM: 2 layers, hidden 32, ffn 64, " in printed
    assert "tp 1, tensors are whole, deduced" in printed
    assert str(tiny_model) in printed
    rows = rows_of(printed)
    assert [FC1, "2", "[2, 128, 32]", "float32", "2 of [1, 128, 32]", "32.8 kB", "__0_0.distcp"] in rows
    assert len([row for row in rows if row[0] == FC1]) == 1
    weights = next(row for row in rows if row[0] == "weights")
    summary = inspect_checkpoint(converted).contents[0]
    assert weights[1:4] == [str(summary.tensors), str(summary.keys), str(summary.boxes)]
    assert weights[4:] == [f"{summary.elements:,}", size_text(summary.bytes), "float32"]
    assert printed.rstrip().endswith("complete; sizes were looked at, not what is in the files")


def test_a_checkpoint_of_a_lora_run(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With TP2, B of the query and A of the output projection are cut, and the others whole."""
    assert main(["inspect", str(lora_run / "checkpoint-1")]) == 0
    printed = capsys.readouterr().out
    assert "of LoRA adapters" in printed
    assert "1 of 1 (trainer_state.json)" in printed
    assert "tp 2, pp 1, vpp 1, cp 1, dp 1, 2 ranks wrote (trainer_state.json)" in printed
    assert "LORA: rank 4, alpha " in printed
    rows = {row[0]: row[1:] for row in rows_of(printed)}
    query, output = "self_attention.linear_qkv.q_proj_lora", "self_attention.linear_proj.o_proj_lora"
    assert rows[f"adapter.layers.*.{query}_A"][:4] == ["2", "[4, 32]", "float32", "whole"]
    assert rows[f"adapter.layers.*.{query}_B"][:4] == ["2", "[32, 4]", "float32", "2 of [16, 4]"]
    assert rows[f"adapter.layers.*.{output}_A"][:4] == ["2", "[4, 32]", "float32", "2 of [4, 16]"]
    tensors = load_file(lora_run / "adapter" / "adapter_model.safetensors")
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert rows["adapter"][3] == f"{elements:,}"
    assert rows["optimizer"][3] == f"{3 * elements:,}"
    assert not [name for name in rows if name.startswith("optimizer.")]

    assert main(["inspect", str(lora_run / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "PEFT adapter (safetensors)" in printed
    assert "boxes" not in next(line for line in printed.splitlines() if "┃ name" in line)


def test_every_tensor_and_every_file(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = lora_run / "checkpoint-1"
    assert main(["inspect", str(checkpoint), "--tensors", "--files"]) == 0
    names = [row[0] for row in rows_of(capsys.readouterr().out)]
    found = inspect_checkpoint(checkpoint)
    assert found.contents[-1].content == "optimizer"
    assert {tensor.name for tensor in found.tensors} <= set(names)
    assert {file.name for file in found.files} <= set(names)
    assert "hf_companions/adapter_config.json" in names


def test_the_directory_of_a_run_is_refused_with_a_hint(
    lora_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([str(lora_run)], capsys, f"pass one in it, such as {lora_run / 'checkpoint-1'}")


@pytest.mark.parametrize(
    "words",
    [
        ["PATH", "--json"],
        ["--json", "PATH"],
        ["--json", "true", "PATH"],
        ["--json=true", "PATH", "--files"],
        ["--json", "--checkpoint", "PATH"],
        ["--checkpoint=PATH", "--json"],
    ],
)
def test_json_wherever_the_path_stands(
    converted: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["inspect", *(word.replace("PATH", str(converted)) for word in words)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value == json.loads(json.dumps(inspect_checkpoint(converted).as_dict()))


def test_json_has_the_totals_of_safetensors(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_model), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    tensors = load_file(tiny_model / "model.safetensors")
    assert {item["name"]: item["shape"] for item in value["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    assert value["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert value["contents"]["weights"]["elements"] == sum(tensor.numel() for tensor in tensors.values())
    assert value["model"]["parameters"] == value["contents"]["weights"]["elements"]
    assert value["files"] == [
        {"name": path.name, "bytes": path.stat().st_size} for path in sorted(tiny_model.iterdir())
    ]
    keys = {"path", "kind", "step", "step_source", "total_steps", "model", "adapter", "layout", "contents"}
    keys |= {"tensors", "manifest", "files", "problems", "notes", "good", "bytes", "file_bytes"}
    assert value.keys() == keys


def test_no_line_is_folded_in_a_pipe(checkpoint: Path, cache: Path) -> None:
    deep = checkpoint.parent / ("d" * 120) / "checkpoint-500"
    shutil.copytree(checkpoint, deep)
    run = braid("inspect", str(deep), cache=cache, COLUMNS="40")
    assert (run.code, run.stderr) == (0, "")
    assert str(deep) in run.stdout
    names = [row[0] for row in rows_of(run.stdout)]
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names
    assert "" not in names
    assert "500 (directory name)" in run.stdout


def test_problems_are_printed_and_the_exit_code_is_1(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    assert main(["inspect", str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("problem: ")]
    assert "__0_0.distcp does not exist" in line
    assert "1 problem; " in printed
    assert FC1 in printed
    assert main(["inspect", str(checkpoint), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["good"] is False
    assert [problem["file"] for problem in value["problems"]] == ["__0_0.distcp"]


def test_names_are_printed_as_they_are(
    model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What looks like rich's markup is none, and what steers a terminal is escaped."""
    tensors = load_file(model / "model.safetensors")
    tensors[RED] = tensors["model.norm.weight"].clone()
    tensors["a\x1b[31mb\nc"] = tensors["model.norm.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    assert main(["inspect", str(model)]) == 1
    printed = capsys.readouterr().out
    names = [row[0] for row in rows_of(printed)]
    assert RED in names
    assert r"'a\x1b[31mb\nc'" in names
    assert "\x1b[31mb" not in printed

    manifest = checkpoint / "braid-manifest.json"
    value = json.loads(manifest.read_text())
    value["command"], value["source"]["path"] = "[bold]x[/bold]\x1b[31m", "/\n/"
    manifest.write_text(json.dumps(value))
    assert main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert r"[bold]x[/bold]\x1b[31m" in printed
    assert r"/\n/" in printed


def test_hostile_metadata_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
            return (os.mkdir, (str(checkpoint.parent / "ran"),))

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused([str(checkpoint)], capsys, ".metadata", "do not use this checkpoint")
    assert not (checkpoint.parent / "ran").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pass it: braid inspect PATH"),
        (["--json"], "pass it: braid inspect PATH"),
        (["a", "b"], "one directory, not 2: a b"),
        (["a", "--checkpoint", "b"], "a and --checkpoint are the same option"),
        (["--checkpoint"], "checkpoint needs a value"),
        (["nowhere"], "checkpoint nowhere does not exist"),
        (["nowhere", "--jsom"], "did you mean --json?"),
        (["nowhere", "--json", "maybe"], "one directory, not 2"),
    ],
)
def test_words_that_cannot_be_meant(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(words, capsys, said)


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "  inspect   " in capsys.readouterr().out
    assert main(["inspekt"]) == 2
    assert "sft, convert, merge, verify, inspect" in capsys.readouterr().err


def test_help_needs_no_torch_and_a_report_no_megatron(converted: Path) -> None:
    report = "print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    for words, heavy in (
        (["--help"], {"torch", "transformers", "megatron"}),
        ([str(converted)], {"megatron"}),
    ):
        code = f"import sys\nfrom launch.cli import main\nassert main(['inspect', *{words}]) == 0\n{report}"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert not set(result.stdout.splitlines()[-1].split()) & heavy
    assert (
        "--tensors"
        in subprocess.run(
            [sys.executable, "-m", "launch.cli", "inspect", "-h"], cwd=ROOT, capture_output=True, text=True
        ).stdout
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (145_412_407_296, "145.4 GB"),
        (2**62, "4.6 EB"),
    ],
)
def test_sizes_for_a_reader(count: int, text: str) -> None:
    assert size_text(count) == text
