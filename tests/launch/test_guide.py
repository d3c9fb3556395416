"""The commands of ms-swift's guide to several GPUs, as they stand but for the program's name, the paths of
model and data, the number of rows, and the device: each trains, evaluates, saves and exports.
"""

import json
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.launch.runs import Run, braid, read_jsonl
from tests.support.models import save_tiny_model_with_words

DATA = "configs/data/qa.jsonl"
LORA = f"""--model MODEL --train_type lora --dataset '{DATA}#60' '{DATA}#70' --torch_dtype bfloat16
--num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4
--lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50
--save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir OUT
--system 'You are a helpful assistant.' --warmup_ratio 0.05 --dataloader_num_workers 4 --device cpu"""
FULL = f"""--model MODEL --train_type full --dataset '{DATA}#70' --torch_dtype bfloat16 --num_train_epochs 1
--per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 1e-5
--gradient_checkpointing true --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5
--max_length 2048 --output_dir OUT --warmup_ratio 0.05 --device cpu"""

DS_CONFIG = """{
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto"
        }
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": true},
        "allgather_partitions": true,
        "allgather_bucket_size": 2e8,
        "overlap_comm": true,
        "reduce_scatter": true,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": true
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": false
}"""
"""Of section 3.3. Stage 3 is the same file with another number, and offload_param."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the guide's kind: Qwen2.5."""
    shape = {"num_hidden_layers": 2, "max_position_embeddings": 4096}
    return save_tiny_model_with_words("qwen2_tied", tmp_path_factory.mktemp("guide") / "model", **shape)


def run(words: str, model: Path, out: Path, cache: Path, **environment: str) -> Run:
    """A command of the guide."""
    places = {"MODEL": str(model), "OUT": str(out)}
    return braid("sft", *(places.get(word, word) for word in shlex.split(words)), cache=cache, **environment)


def assert_trained(done: Run, model: Path, out: Path, steps: int, *, lora: bool) -> None:
    """It was trained to the end, evaluated and saved, and what it left is loaded by whom it is for."""
    assert done.code == 0, done.stderr
    records = read_jsonl(out / "metrics.jsonl")
    assert max(record["step"] for record in records) == steps
    assert [record["step"] for record in records if "eval_loss" in record] == [steps]
    assert (out / f"checkpoint-{steps}").is_dir()
    assert (out / "loss.png").stat().st_size
    if lora:
        base = AutoModelForCausalLM.from_pretrained(model)
        tuned = PeftModel.from_pretrained(base, str(out / "adapter"))
        assert tuned.peft_config["default"].r == 8
    else:
        AutoModelForCausalLM.from_pretrained(out / "hf")


def test_ddp_lora(model: Path, tmp_path: Path, cache: Path) -> None:
    """Section 3.2."""
    environment = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "NPROC_PER_NODE": "4"}
    done = run(LORA, model, tmp_path / "out", cache, **environment)
    assert "4 ranks = TP 1 x PP 1 x CP 1 x DP 4" in done.stdout
    assert_trained(done, model, tmp_path / "out", 3, lora=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_lora(model: Path, tmp_path: Path, cache: Path, stage: int) -> None:
    """Section 3.3: with a JSON file."""
    config = tmp_path / "ds_config.json"
    config.write_text(DS_CONFIG.replace('"stage": 2', f'"stage": {stage}'))
    words = f"{LORA} --deepspeed {config}"
    done = run(words, model, tmp_path / "out", cache, NPROC_PER_NODE="2")
    assert "2 ranks = TP 1 x PP 1 x CP 1 x DP 2" in done.stdout
    strategy = "optim_grads" if stage == 2 else "optim_grads_params"
    assert f"data_parallel_sharding_strategy {strategy}\n" in done.stdout
    assert_trained(done, model, tmp_path / "out", 5, lora=True)


@pytest.mark.parametrize("fsdp", ["'full_shard auto_wrap'", "fsdp2"])
def test_fsdp_full(model: Path, tmp_path: Path, cache: Path, fsdp: str) -> None:
    """Section 3.4."""
    words = f"{FULL} --fsdp {fsdp} --fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer"
    done = run(words, model, tmp_path / "out", cache, NPROC_PER_NODE="2")
    assert "2 ranks = TP 1 x PP 1 x CP 1 x DP 2" in done.stdout
    assert "data_parallel_sharding_strategy optim_grads_params\n" in done.stdout
    assert_trained(done, model, tmp_path / "out", 5, lora=False)


def test_two_nodes(model: Path, tmp_path: Path, cache: Path) -> None:
    """Section 3.5: the same command on each node, but for its rank; here both are this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def node(rank: int) -> Run:
        words = f"{FULL} --nnodes 2 --node_rank {rank} --master_addr 127.0.0.1 --master_port {port}"
        return run(words, model, tmp_path / "out", cache, NPROC_PER_NODE="2")

    with ThreadPoolExecutor(2) as nodes:
        first, second = nodes.map(node, (0, 1))
    assert second.code == 0, second.stderr
    assert "4 ranks = TP 1 x PP 1 x CP 1 x DP 4" in first.stdout
    assert_trained(first, model, tmp_path / "out", 3, lora=False)
    assert (
        json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["layout"]["dp"]
        == 4
    )
