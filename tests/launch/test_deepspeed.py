"""Commands written for DeepSpeed and FSDP: what a user sees, and that the numbers stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from tests.launch.runs import Place, braid, read_jsonl

ADAM = {"lr": 2e-3, "betas": [0.9, 0.99], "eps": 1e-7, "weight_decay": 0.05}
SCHEDULE = {"warmup_num_steps": 2, "warmup_type": "linear", "total_num_steps": 6}
SETTINGS: dict[str, Any] = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
    "optimizer": {"type": "AdamW", "params": ADAM},
    "scheduler": {"type": "WarmupDecayLR", "params": SCHEDULE},
    "gradient_clipping": 0.5,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 4,
}
FLAGS = (
    "--learning_rate 2e-3 --adam_beta1 0.9 --adam_beta2 0.99 --adam_epsilon 1e-7 --weight_decay 0.05 "
    "--lr_scheduler_type linear --warmup_steps 2 --max_grad_norm 0.5 --global_batch_size 4"
)


def written(place: Place, settings: dict[str, Any]) -> str:
    path = place.root / "ds.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


def curve(place: Place, cache: Path, name: str, *words: str) -> list[tuple[float, float]]:
    """Losses and learning rates of six steps of two data-parallel ranks."""
    out = place.root / name
    run = braid(
        *place.sft("--tensor_model_parallel_size", "1", "--output_dir", str(out)),
        *("--max_steps", "6", "--report_to", "none", *words),
        cache=cache,
    )
    assert run.code == 0, run.stderr
    return [(row["loss"], row["lr"]) for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]


def test_the_curve_is_that_of_the_same_flags(place: Place, cache: Path) -> None:
    plain = curve(place, cache, "plain", *FLAGS.split())
    assert len(plain) == 6
    assert len({rate for _, rate in plain}) > 3
    from_file = curve(place, cache, "file", "--deepspeed", written(place, SETTINGS))
    of_names = [
        curve(place, cache, name, *FLAGS.split(), "--deepspeed", name) for name in ("zero0", "zero2", "zero3")
    ]
    for found in (from_file, *of_names):
        for (loss, rate), (wanted, wanted_rate) in zip(found, plain, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5)
            assert rate == pytest.approx(wanted_rate, rel=1e-9)
    recorded = yaml.safe_load((place.root / "zero0" / "args.yaml").read_text())
    assert str(recorded).count("'use_distributed_optimizer': False") == 1


def test_a_dry_run_prints_what_became_what(place: Place) -> None:
    words = place.sft("--tensor_model_parallel_size", "1", "--max_steps", "6", "--dry_run")
    assert main([*words, "--deepspeed", written(place, SETTINGS)]) == 0
    printed = place.capsys.readouterr().out
    table = printed[printed.index("settings of ") :]
    assert table.splitlines()[0].endswith("ds.json:")
    lines = {" ".join(line.split()) for line in table.splitlines()}
    assert "gradient_clipping 0.5 max_grad_norm 0.5" in lines
    assert "zero_optimization.stage 1 use_distributed_optimizer true" in lines
    assert "optimizer.type AdamW the optimizer is AdamW" in lines
    assert any(line.startswith("zero_optimization.reduce_bucket_size") for line in lines)
    assert list(table.splitlines())[1].strip() == "became"
    assert "learning_rate: 0.002" in printed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            "--deepspeed zero2 --tensor_model_parallel_size 1 --pipeline_model_parallel_size 2",
            "pipeline_model_parallel_size 2 does not go with data_parallel_sharding_strategy optim_grads "
            "(ZeRO-2); leave it at 1, or take optim (--deepspeed zero1)",
        ),
        (
            "--fsdp full_shard auto_wrap --tensor_model_parallel_size 1 --pipeline_model_parallel_size 2",
            "with data_parallel_sharding_strategy optim_grads_params (ZeRO-3, FSDP); leave it at 1",
        ),
        ("--deepspeed zero3 --fp8_recipe blockwise", "fp8_recipe does not go with"),
        ("--deepspeed gone.json", "--deepspeed gone.json cannot be read: No such file"),
        ("--deepspeed zero9", "--deepspeed zero9 is neither a JSON file nor one of zero0"),
        ("--deepspeed zero1 --use_distributed_optimizer false", "contradicts zero_optimization.stage 1"),
        ("--warmup_steps -1", "warmup_steps must not be negative, not -1"),
    ],
)
def test_what_cannot_be_is_refused(place: Place, words: str, named: str) -> None:
    place.refused(place.sft(*words.split()), named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"train_batch_size": 6},
            "ds.json: train_batch_size 6 is not train_micro_batch_size_per_gpu 1 x "
            "gradient_accumulation_steps 2 x 1 data-parallel ranks = 2",
        ),
        (
            {"train_batch_size": 5, "gradient_accumulation_steps": "auto"},
            "train_batch_size 5 is not a multiple of train_micro_batch_size_per_gpu 2 x 1 data-parallel",
        ),
    ],
)
def test_batches_that_do_not_agree(place: Place, changes: dict[str, Any], named: str) -> None:
    micro = 1 if "gradient_accumulation_steps" not in changes else 2
    settings = SETTINGS | {"train_micro_batch_size_per_gpu": micro} | changes
    path = written(place, settings)
    place.refused(place.sft("--max_steps", "6", "--deepspeed", path), named)
