"""Runs of a mixture of experts, whole and of LoRA adapters: resumed bitwise, and under other layouts."""

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.parity.test_resume import LORA, Runs, assert_continued, assert_same_weights, losses, weights
from tests.support.models import save_tiny_model_with_words
from tests.support.workers import WorkerPool


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model_with_words("qwen2_moe", tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def runs(workers: WorkerPool, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(workers, model_dir, tmp_path_factory.mktemp("runs"))


EP2_TP2_PP1 = ["--expert_model_parallel_size", "2", "--tensor_model_parallel_size", "2"]


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Path:
    """Six steps at EP2 x TP2 x DP2, with a checkpoint after the third."""
    return runs.start("straight", [*EP2_TP2_PP1, "--save_steps", "3"])


def test_resumed_run_is_bitwise_the_uninterrupted_one(runs: Runs, straight: Path, tmp_path: Path) -> None:
    resumed = runs.start("resumed", EP2_TP2_PP1, resume=straight / "checkpoint-3")
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    assert_same_weights(
        weights(straight / "checkpoint-6", tmp_path / "a"), weights(resumed / "checkpoint-6", tmp_path / "b")
    )


@pytest.mark.parametrize(
    ("name", "world_size", "flags"),
    [
        ("EP1", 1, []),
        ("EP4", 4, ["--expert_model_parallel_size", "4"]),
        (
            "EP2xPP2",
            4,
            ["--expert_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"],
        ),
        (
            "EP2xETP2",
            4,
            ["--expert_model_parallel_size", "2", "--expert_tensor_parallel_size", "2"],
        ),
    ],
)
def test_another_layout_continues_the_run(
    runs: Runs, straight: Path, name: str, world_size: int, flags: list[str]
) -> None:
    resumed = runs.start(name, flags, world_size=world_size, resume=straight / "checkpoint-3")
    assert_continued(straight, resumed)


def test_what_is_logged(straight: Path) -> None:
    """Four layers of which three have eight experts, two to a token."""
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    before = 0
    for record in records:
        assert record["dropped_tokens"] == 0
        assert sum(record["tokens_per_expert"]) == 3 * 2 * (record["tokens"] - before)
        assert record["expert_load_min"] <= 1 <= record["expert_load_max"]
        assert 0.9 < record["aux_loss"] / 2 < 8
        before = record["tokens"]


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tokens_beyond_the_capacity_are_dropped_and_counted(runs: Runs, straight: Path, policy: str) -> None:
    """At half of the even share at least every second place is one too many."""
    flags = ["--moe_expert_capacity_factor", "0.5", "--moe_token_drop_policy", policy]
    output = runs.start(f"dropping-{policy}", [*EP2_TP2_PP1, *flags, "--max_steps", "3"])
    before = 0
    for record in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        given, dropped = sum(record["tokens_per_expert"]), record["dropped_tokens"]
        assert given + dropped == 3 * 2 * (record["tokens"] - before)
        assert given > 0
        assert dropped >= 0.4 * (given + dropped)
        assert math.isfinite(record["loss"])
        assert math.isfinite(record["grad_norm"])
        before = record["tokens"]
    assert losses(output)[1] != losses(straight)[1]


@pytest.fixture(scope="module")
def straight_lora(runs: Runs) -> Path:
    """The same with adapters in attention, shared and routed experts."""
    return runs.start("lora", [*EP2_TP2_PP1, *LORA, "--save_steps", "3"])


def test_resumed_lora_run_is_bitwise_the_uninterrupted_one(
    runs: Runs, straight_lora: Path, tmp_path: Path
) -> None:
    resumed = runs.start("lora-resumed", [*EP2_TP2_PP1, *LORA], resume=straight_lora / "checkpoint-3")
    expected = losses(straight_lora)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    trained = weights(straight_lora / "checkpoint-6", tmp_path / "a")
    assert_same_weights(trained, weights(resumed / "checkpoint-6", tmp_path / "b"))
    assert any(".mlp.experts.base_layer.lora_B" in name and tensor.any() for name, tensor in trained.items())


@pytest.mark.parametrize(("name", "world_size", "ep_size"), [("EP1", 1, "1"), ("EP4", 4, "4")])
def test_another_layout_continues_the_lora_run(
    runs: Runs, straight_lora: Path, name: str, world_size: int, ep_size: str
) -> None:
    flags = ["--expert_model_parallel_size", ep_size, *LORA]
    resumed = runs.start(f"lora-{name}", flags, world_size=world_size, resume=straight_lora / "checkpoint-3")
    assert_continued(straight_lora, resumed)


def test_peft_loads_what_was_trained(straight_lora: Path, model_dir: Path, tmp_path: Path) -> None:
    trained = weights(straight_lora / "checkpoint-6", tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
    loaded = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if ".lora_" in n}
    assert_same_weights(loaded, trained)
