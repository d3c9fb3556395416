"""`braid sft --train_type lora` for real: what a run leaves, where it starts from, what it does not touch."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launch.cli import main
from tests.launch.runs import braid, everything_in, question_rows, read_jsonl, write_rows
from tests.launch.test_sft import SETTINGS, Trained
from tests.support.models import save_adapter

LORA = ("--train_type", "lora", "--lora_rank", "4", "--lora_dropout", "0.1")


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> dict[str, bytes | None]:
    """Every byte of the base before anything ran."""
    return everything_in(tiny_model)


@pytest.fixture(scope="module")
def trained(base: dict, tiny_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three steps on two ranks."""
    directory = tmp_path_factory.mktemp("lora")
    data = write_rows(directory / "data.jsonl", question_rows())
    words = ["sft", "--model", str(tiny_model), "--dataset", str(data), *SETTINGS, *LORA]
    words += ["--tensor_model_parallel_size", "2", "--nproc_per_node", "2", "--max_steps", "3"]
    out = directory / "out"
    return Trained(run=braid(*words, "--output_dir", str(out), cache=cache), words=words, out=out)


def test_a_run_leaves_an_adapter_and_nothing_of_the_base(
    trained: Trained, tiny_model: Path, base: dict
) -> None:
    assert trained.run.code == 0, trained.run.stderr
    assert trained.run.stderr == ""
    assert "trainable parameters" in trained.run.stdout
    names = {path.name for path in trained.out.iterdir()}
    assert names == {"args.yaml", "metrics.jsonl", "checkpoint-3", "adapter", "loss.png", "README.md"}
    assert {path.name for path in (trained.out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "braid-manifest.json",
    }
    stored = sum(path.stat().st_size for path in (trained.out / "checkpoint-3").glob("*.distcp"))
    assert stored < (tiny_model / "model.safetensors").stat().st_size, "the checkpoint holds the base"
    assert everything_in(tiny_model) == base
    card = (trained.out / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained" in card


def test_peft_loads_what_was_trained(trained: Trained, tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = plain(ids).logits
        model = PeftModel.from_pretrained(plain, trained.out / "adapter")
        after = model(ids).logits
    assert (after - before).abs().max() > 1e-4
    found = load_file(trained.out / "adapter" / "adapter_model.safetensors")
    wanted = {
        name.replace(".default", ""): weight for name, weight in model.named_parameters() if "lora" in name
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert all(found[name].abs().max() > 0 for name in found), "an adapter that was not trained"


def test_a_run_goes_on_from_a_checkpoint(trained: Trained, cache: Path) -> None:
    """Under another layout, one step more."""
    out = trained.out.with_name("continued")
    words = [*trained.words, "--resume_from_checkpoint", str(trained.out / "checkpoint-3")]
    words += ["--tensor_model_parallel_size", "1", "--nproc_per_node", "1", "--max_steps", "4"]
    run = braid(*words, "--output_dir", str(out), cache=cache)
    assert run.code == 0, run.stderr
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl") if "loss" in record] == [4]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--lora_rank", "2"], "belongs to a LoRA run with another r (4, now 2)"),
        (["--target_modules", "q_proj"], "belongs to a LoRA run with another target_modules"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    trained: Trained, tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = [
        "--resume_from_checkpoint",
        str(trained.out / "checkpoint-3"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*trained.words, *resume, *words]) == 2
    assert named in capsys.readouterr().err


def test_full_training_does_not_resume_from_adapters(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in trained.words if word not in LORA]
    resume = [
        "--resume_from_checkpoint",
        str(trained.out / "checkpoint-3"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*words, *resume]) == 2
    assert "is of LoRA training; resume it with --train_type lora" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "2"])
def test_an_adapter_of_peft_is_the_start(
    tiny_model: Path, data: Path, tmp_path: Path, cache: Path, steps: str
) -> None:
    """After zero steps it comes back byte by byte; after two, with its configuration and other numbers."""
    adapter = save_adapter(
        tiny_model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_rslora=True
    )
    out = tmp_path / "out"
    words = ["sft", "--model", str(tiny_model), "--dataset", str(data), "--adapter", str(adapter), *SETTINGS]
    words += ["--train_type", "lora", "--max_steps", steps, "--output_dir", str(out)]
    run = braid(*words, cache=cache)
    assert run.code == 0, run.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        same = (out / "adapter" / name).read_bytes() == (adapter / name).read_bytes()
        assert same == (steps == "0" or name == "adapter_config.json"), name


def test_flags_must_not_contradict_the_adapter(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    words = [
        "sft",
        "--model",
        str(tiny_model),
        "--dataset",
        str(data),
        "--adapter",
        str(adapter),
        *SETTINGS,
        *LORA,
    ]
    words += ["--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "lora_dropout 0.1 contradicts 0.0 of adapter" in capsys.readouterr().err


def test_the_written_configuration_is_what_was_asked_for(trained: Trained) -> None:
    config = json.loads((trained.out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.1)
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
