"""Bad input: one line that names what is wrong, exit code 2, and not one file changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from launch.tiny import build_tiny_qwen3
from tests.launch.runs import Place, assert_one_line, braid, everything_in, question_rows, write_rows

LAST_NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _index(model: Path, shard: str) -> None:
    """An index in place of the single file; every tensor is said to be in `shard`."""
    names = load_file(model / "model.safetensors").keys()
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


# What is done to a model directory -> what the message names.
BROKEN_MODELS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no directory": (lambda m: m.rename(m.parent / "gone"), ("model does not exist",)),
    "no config": (lambda m: (m / "config.json").unlink(), ("model has no config.json",)),
    "broken config": (
        lambda m: (m / "config.json").write_text('{"a": '),
        ("config.json is not readable JSON",),
    ),
    "config is a list": (
        lambda m: (m / "config.json").write_text("[]"),
        ("config.json must hold a JSON object",),
    ),
    "architecture": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(architectures=["LlamaForCausalLM"])),
        ("config.json", "LlamaForCausalLM is not supported", "Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3"),
    ),
    "no architecture": (
        lambda m: edit_json(m / "config.json", lambda c: c.pop("architectures")),
        ("config.json", "architecture None is not supported"),
    ),
    "size is no number": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(hidden_size="big")),
        ("config.json", "hidden_size must be a positive integer, not 'big'"),
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("model.safetensors",)),
    "only pickles": (_pickle, ("pytorch_model.bin", "only safetensors are read")),
    "missing weight": (lambda m: edit_weights(m, lambda w: w.pop(DOWN)), (DOWN, "is missing")),
    "surplus weight": (
        lambda m: edit_weights(m, lambda w: w.update({"model.extra.weight": torch.zeros(2)})),
        ("model.extra.weight has no place in the model",),
    ),
    "mis-shaped weight": (
        lambda m: edit_weights(m, lambda w: w.update({LAST_NORM: torch.zeros(31)})),
        (LAST_NORM, "shape [31]", "[32]"),
    ),
    "one layer less than the config says": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(num_hidden_layers=3)),
        ("model.layers.2.", "is missing (and 10 more)"),
    ),
    "truncated file": (lambda m: _truncate(m / "model.safetensors"), ("model.safetensors is truncated",)),
    "no safetensors file": (
        lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64),
        ("model.safetensors",),
    ),
    "index escapes": (
        lambda m: _index(m, "../outside.safetensors"),
        ("../outside.safetensors is not a plain file name",),
    ),
    "index escapes by an absolute path": (
        lambda m: _index(m, "/etc/passwd"),
        ("/etc/passwd is not a plain file name",),
    ),
    "index names a missing file": (lambda m: _index(m, "a.safetensors"), ("a.safetensors does not exist",)),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_broken_models(place: Place, case: str) -> None:
    damage, named = BROKEN_MODELS[case]
    damage(place.model)
    model, out = str(place.model), str(place.out)
    place.refused(place.sft(), *named)
    place.refused(place.sft("--dry_run"), *named)
    place.refused(["convert", "--to", "mcore", "--model", model, "--output_dir", out], *named)
    place.refused(["verify", "--model", model, "--checkpoint", model], *named)


def _no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    edit_json(model / "tokenizer_config.json", lambda c: c.pop("chat_template", None))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), ("model has no tokenizer",)),
        (lambda m: (m / "tokenizer.json").write_text("{}"), ("the tokenizer of", "model cannot be loaded")),
        (_no_template, ("model has no chat template",)),
        (
            lambda m: (m / "chat_template.jinja").write_text("{% for"),
            ("the chat template", "end of template"),
        ),
        (lambda m: (m / "chat_template.jinja").write_text("hello"), ("chat template", "model")),
    ],
)
def test_broken_tokenizers(place: Place, damage: Callable[[Path], Any], named: tuple[str, ...]) -> None:
    damage(place.model)
    place.refused(place.sft("--dry_run"), *named)


def test_tokenizer_of_another_model(place: Place) -> None:
    other = build_tiny_qwen3(
        place.root / "other",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        head_dim=8,
        vocab_size=200,
    )
    place.capsys.readouterr()
    place.refused(place.sft("--dry_run", "--model", str(other)), "token id", "vocab_size is 200")


def _unanswered(path: Path) -> None:
    rows = question_rows()
    rows[2]["messages"].pop()
    write_rows(path, rows)


def _broken_line(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], '{"messages": [', *lines[2:]]), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: d.unlink(), ("data.jsonl does not exist",)),
        (_unanswered, ("data.jsonl, row 3:", "no assistant answer")),
        (_broken_line, ("data.jsonl, row 2:", "not valid JSON")),
        (lambda d: d.write_text(""), ("data.jsonl holds no rows",)),
        (
            lambda d: write_rows(d, [{"text": "no format"}]),
            ("data.jsonl, row 1:", "no recognised keys (found: text)"),
        ),
        (lambda d: d.write_text("[]\n"), ("data.jsonl, row 1:", "not an object")),
        (lambda d: write_rows(d, question_rows(1)), ()),
    ],
)
def test_broken_data(place: Place, damage: Callable[[Path], Any], named: tuple[str, ...]) -> None:
    damage(place.data)
    extra = ["--split_dataset_ratio", "0.5"] if not named else []
    place.refused(
        place.sft("--dry_run", *extra), *(named or ("split_dataset_ratio=0.5 needs at least 2 rows",))
    )


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("", "holds no rows"),
        ("{oops\n", "row 1: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "?"}]}\n', "row 1"),
    ],
)
def test_broken_stream(place: Place, rows: str, named: str) -> None:
    """Said of the first buffer before anything is written."""
    place.data.write_text(rows)
    place.refused(place.sft("--dry_run", "--streaming", "--max_steps", "1"), named)


def test_a_stream_of_rows_that_are_all_too_long(place: Place) -> None:
    words = ("--dry_run", "--streaming", "--max_steps", "1", "--max_length", "4")
    place.refused(place.sft(*words), "none of the 8 rows is left", "max_length=4")


def test_rows_that_are_all_too_long(place: Place) -> None:
    place.refused(place.sft("--dry_run", "--max_length", "4"), "none of the 8 rows is left", "max_length=4")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--lora_rank 4", "lora_rank goes with --train_type lora"),
        ("--tuner_type lora --lora_rank 0", "lora_rank must be at least 1, not 0"),
        ("--train_type lora --lora_alpha 0", "lora_alpha must be positive"),
        ("--train_type lora --lora_dropout 1", "lora_dropout must be in [0, 1)"),
        ("--train_type lora --target_modules q_prj", "target_modules: 'q_prj' is none of the linears"),
        ("--train_type lora --target_modules lm_head", "target_modules: 'lm_head' is none of the linears"),
        ("--train_type lora --target_modules all-linear q_proj", "all-linear stands alone"),
        ("--train_type lora --target_modules (q_proj", "'(q_proj' is not a regular expression"),
        ("--train_type lora --rank_pattern q_proj=3", "rank_pattern must be a JSON object"),
        ('--train_type lora --rank_pattern {"q_proj":0}', "rank 0"),
        ("--train_type lora --use_dora true", "--use_dora: DoRA is not available"),
        ("--train_type lora --quant_bits 4", "--quant_bits: a quantised base (QLoRA) is not available"),
        ("--train_type lora --modules_to_save lm_head", "--modules_to_save: training whole modules"),
        ("--train_type lora --adapter nowhere", "adapter nowhere is not a directory"),
        (
            r"--train_type lora --pipeline_model_parallel_size 2 --tensor_model_parallel_size 1 "
            r"--target_modules model\.layers\.1\..*",
            "pipeline stage 0 would have nothing to train: layers 0-0 have no adapter",
        ),
        ("--context_parallel_size 2", "2 processes do not hold TP 2 x PP 1 x CP 2 = 4 ranks"),
        (
            "--context_parallel_size 2 --tensor_model_parallel_size 1 --cp_comm_type p2p",
            "cp_comm_type p2p needs Transformer Engine; use all_gather or a2a",
        ),
        (
            "--context_parallel_size 4 --nproc_per_node 8 --cp_comm_type a2a",
            "cp_comm_type a2a deals 2 heads and 1 key/value heads of a tensor-parallel rank to",
        ),
        ("--streaming", "streaming needs max_steps"),
        ("--streaming --max_steps 1 --split_dataset_ratio 0.5", "split_dataset_ratio needs all rows"),
        ("--shuffle_buffer_size 0", "shuffle_buffer_size must be at least 1, not 0"),
        ("--expert_model_parallel_size 2", "Qwen3ForCausalLM has no experts"),
        ("--hang_timeout -1", "hang_timeout must not be negative"),
        ("--loss_spike_factor 1", "loss_spike_factor must be above 1"),
        ("--export_steps 3 --save_steps 2", "export_steps 3 must be a multiple of save_steps, not 2"),
        ("--nonfinite ignore", "nonfinite must be one of stop, skip"),
        ("--report_to paper", "report_to 'paper' is not known; choose from tensorboard, wandb"),
        ("--report_to none tensorboard", "report_to none stands alone"),
        ("--learning_rte 1", "unknown option --learning_rte; did you mean --learning_rate?"),
        ("--learning_rate -1", "learning_rate must not be negative, not -1.0"),
        ("--learning_rate nan", "learning_rate must be a number, not 'nan'"),
        ("--weight_decay -0.1", "weight_decay must not be negative"),
        ("--adam_beta2 1", "adam_beta2 must be in [0, 1), not 1.0"),
        ("--adam_epsilon 0", "adam_epsilon must be positive"),
        (
            "--exp_avg_sq_dtype bfloat16 --adam_beta2 0.999",
            "exp_avg_sq_dtype bfloat16 with adam_beta2 0.999 would never forget a gradient",
        ),
        (
            "--exp_avg_dtype bfloat16 --use_distributed_optimizer false",
            "exp_avg_dtype and exp_avg_sq_dtype bfloat16 need use_distributed_optimizer",
        ),
        (
            "--optimizer_cpu_offload true --use_distributed_optimizer false",
            "optimizer_cpu_offload needs use_distributed_optimizer; leave it on",
        ),
        (
            "--optimizer_cpu_offload true --optimizer_offload_fraction 0",
            "optimizer_offload_fraction must be above 0 and at most 1, not 0.0",
        ),
        (
            "--optimizer_cpu_offload true --exp_avg_dtype bfloat16",
            "exp_avg_dtype and exp_avg_sq_dtype are float32 with optimizer_cpu_offload",
        ),
        ("--exp_avg_dtype float16", "exp_avg_dtype must be one of float32, bfloat16"),
        ("--warmup_ratio 2", "warmup_ratio must be in [0, 1], not 2.0"),
        ("--max_steps -1", "max_steps must not be negative, not -1"),
        ("--num_train_epochs 0", "num_train_epochs must be positive"),
        ("--save_steps 0", "save_steps must be at least 1"),
        ("--save_total_limit 0", "save_total_limit must be at least 1"),
        ("--seed -1", "seed must be in [0, 2**32), not -1"),
        ("--max_length 1", "max_length must be at least 2"),
        ("--split_dataset_ratio 1", "split_dataset_ratio must be in [0, 1), not 1.0"),
        ("--dataloader_num_workers -1", "dataloader_num_workers must not be negative"),
        ("--global_batch_size 3 --nproc_per_node 4", "global_batch_size 3 is not a multiple"),
        ("--nproc_per_node 0", "nproc_per_node must be at least 1, not 0"),
        ("--nproc_per_node 3", "3 processes do not hold TP 2 x PP 1 x CP 1 = 2 ranks"),
        ("--nnodes 2", "NNODES > 1 needs NODE_RANK, MASTER_ADDR and MASTER_PORT"),
        ("--nnodes 2 --node_rank 2 --master_addr a --master_port 1", "node_rank must be in [0, 2), not 2"),
        (
            "--tensor_model_parallel_size 3 --nproc_per_node 3",
            "tensor_model_parallel_size 3 does not divide the model's num_attention_heads 4",
        ),
        ("--pipeline_model_parallel_size 4 --nproc_per_node 8", "2 layers cannot fill 4 pipeline chunks"),
        ("--decoder_layers_per_stage 3", "decoder_layers_per_stage [3]"),
        ("--sequence_parallel false", "sequence_parallel cannot be switched off"),
        ("--config none.yaml", "--config none.yaml: No such file"),
    ],
)
def test_settings_that_cannot_be(place: Place, words: str, named: str) -> None:
    place.refused(place.sft(*words.split()), named)


def test_key_value_heads_that_ranks_cannot_share(place: Place) -> None:
    config = json.loads((place.model / "config.json").read_text())
    config |= {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 66}
    (place.model / "config.json").write_text(json.dumps(config))
    place.refused(
        place.sft("--tensor_model_parallel_size", "3", "--nproc_per_node", "3"),
        "tensor_model_parallel_size 3 neither divides the model's num_key_value_heads 2 nor is a multiple",
    )


def test_a_service_that_is_not_installed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.blueprint.find_spec", lambda name: None)
    place.refused(
        place.sft("--report_to", "wandb"), "report_to wandb: it is not installed; pip install wandb"
    )


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("--model", "pass --model DIR"),
        ("--dataset", "pass --dataset FILE"),
        ("--output_dir", "pass --output_dir DIR"),
    ],
)
def test_what_every_run_needs(place: Place, missing: str, named: str) -> None:
    words = place.sft()
    at = words.index(missing)
    place.refused(words[:at] + words[at + 2 :], named)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("NPROC_PER_NODE", "many", "nproc_per_node must be a whole number, not 'many'"),
        ("NPROC_PER_NODE", "3", "3 processes do not hold TP 2"),
        ("NNODES", "2", "NNODES > 1 needs NODE_RANK"),
    ],
)
def test_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    monkeypatch.setenv(name, value)
    words = place.sft()
    words.remove("--nproc_per_node")
    words.remove("2")
    place.refused(words, named)


def test_output_directories(place: Place) -> None:
    place.out.mkdir()
    (place.out / "notes.txt").write_text("mine")
    place.refused(place.sft(), "out is in use", "--resume_from_checkpoint auto")
    place.refused(place.sft("--dry_run"), "out is in use")
    convert = ["convert", "--to", "mcore", "--model", str(place.model), "--output_dir"]
    place.refused([*convert, str(place.out)], "out is not empty")
    file = str(place.out / "notes.txt")
    place.refused(place.sft("--output_dir", file), "notes.txt is a file")
    place.refused([*convert, file], "notes.txt is a file")
    place.refused(
        place.sft("--output_dir", f"{file}/run"), "notes.txt/run cannot be made", "notes.txt is a file"
    )
    place.refused([*convert, f"{file}/run"], "notes.txt/run", "Not a directory")


def test_resuming_from_nothing(place: Place) -> None:
    missing = place.root / "checkpoint-7"
    resume = place.sft("--resume_from_checkpoint", str(missing))
    place.refused(resume, "checkpoint-7 is not a directory")
    missing.mkdir()
    place.refused(resume, "checkpoint-7 has no braid-manifest.json")
    (missing / "braid-manifest.json").write_text("{}")
    place.refused(resume, "checkpoint-7/braid-manifest.json is damaged")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--model M --output_dir O", "pass --to mcore or --to hf"),
        ("--to onnx", "to must be one of mcore, hf, not 'onnx'"),
        ("--to mcore --output_dir O", "--to mcore reads --model"),
        ("--to hf --output_dir O", "--to hf reads --checkpoint"),
        ("--to mcore --model M --checkpoint M --output_dir O", "--checkpoint does not go with --to mcore"),
        ("--to mcore --model M", "pass --output_dir DIR"),
        (
            "--to mcore --model M --output_dir O --max_shard_size 1GB",
            "max_shard_size does not go with --to mcore",
        ),
        ("--to mcore --model M --output_dir O --torch_dtype int8", "torch_dtype must be one of"),
        ("--to mcore --model M --output_dir O --tensor_model_parallel_size 8", "num_attention_heads 4"),
        ("--to mcore --model M --output_dir O --tensor_model_parallel_size 0", "must be at least 1, not 0"),
        ("--to mcore --model M --output_dir O --pipeline_model_parallel_size 3", "2 layers cannot fill 3"),
        ("--to hf --checkpoint NONE --output_dir O", "NONE does not exist"),
        ("--to hf --checkpoint M --output_dir O", "is incomplete"),
        ("--to hf --checkpoint M --output_dir O --max_shard_size lots", "max_shard_size must be a size"),
        ("--to hf --checkpoint M --output_dir O --max_shard_size 0", "max_shard_size"),
        ("--to mcore --modle M", "unknown option --modle; did you mean --model?"),
    ],
)
def test_convert(place: Place, words: str, named: str) -> None:
    paths = {"M": str(place.model), "O": str(place.out), "NONE": str(place.root / "NONE")}
    place.refused(["convert", *(paths.get(word, word) for word in words.split())], named)


def test_a_checkpoint_with_a_part_missing(place: Place) -> None:
    checkpoint = place.root / "mcore"
    assert (
        main(["convert", "--to", "mcore", "--model", str(place.model), "--output_dir", str(checkpoint)]) == 0
    )
    export = ["convert", "--to", "hf", "--checkpoint", str(checkpoint), "--output_dir", str(place.out)]
    compare = ["verify", "--model", str(place.model), "--checkpoint", str(checkpoint)]
    shard = checkpoint / "__0_0.distcp"
    _truncate(shard)
    place.refused(export, shard.name)
    place.refused(compare, shard.name)
    shard.unlink()
    place.refused(export, shard.name)
    place.refused(compare, shard.name)
    (checkpoint / ".metadata").unlink()
    place.refused(export, "mcore is incomplete: it has no .metadata")


def test_verify(place: Place) -> None:
    model, missing = str(place.model), str(place.root / "none")
    place.refused(["verify", "--model", model], "pass both")
    place.refused(["verify", "--model", missing, "--checkpoint", model], "none does not exist")
    place.refused(["verify", "--model", model, "--checkpoint", missing], "none does not exist")
    report = ["--report", f"{missing}/report.json"]
    place.refused(
        ["verify", "--model", model, "--checkpoint", model, *report], "none/report.json cannot be written"
    )


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert_one_line(
        capsys.readouterr().err, "train", "unknown command 'train'; commands are sft, convert, merge, verify"
    )
    assert main([]) == 2
    assert "usage: braid COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda model, data: _unanswered(data), ("data.jsonl, row 3:", "no assistant answer")),
        (lambda model, data: _truncate(model / "model.safetensors"), ("model.safetensors is truncated",)),
    ],
)
def test_several_processes_end_with_one_message(
    place: Place, cache: Path, damage: Callable[[Path, Path], Any], named: tuple[str, ...]
) -> None:
    damage(place.model, place.data)
    words = place.sft()
    del words[words.index("--nproc_per_node") :][:2]
    before = everything_in(place.root)
    run = braid(*words, cache=cache, NPROC_PER_NODE="2")
    assert run.code == 2, run.stderr
    assert_one_line(run.stderr, "sft", *named)
    assert run.stdout == ""
    assert run.left_running == ()
    assert everything_in(place.root) == before
