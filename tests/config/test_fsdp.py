"""FSDP's flags and files become options, or are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.adopt import adopt
from engine.config.options import SftConfig
from engine.config.parse import flatten, parse
from engine.errors import ConfigError

STRATEGY = "data_parallel_sharding_strategy"


def taken(*argv: str) -> dict[str, Any]:
    config, given = parse(SftConfig, argv)
    adopt(config, given)
    return flatten(config)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        taken(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        ([], "optim_grads_params"),
        (["true"], "optim_grads_params"),
        (["auto_wrap"], "optim_grads_params"),
        (["fsdp2"], "optim_grads_params"),
        (["full_shard", "auto_wrap"], "optim_grads_params"),
        (["full_shard auto_wrap"], "optim_grads_params"),
        (["full_shard,auto_wrap"], "optim_grads_params"),
        (["FULL_SHARD"], "optim_grads_params"),
        (["shard_grad_op"], "optim_grads"),
        (["no_shard"], "no_shard"),
        (["false"], None),
        ([""], None),
    ],
)
def test_words(words: list[str], strategy: str | None) -> None:
    options = taken("--fsdp", *words)
    assert options[STRATEGY] == strategy
    assert options["use_distributed_optimizer"] is (strategy != "no_shard")


def test_without_the_flag_nothing_changes() -> None:
    assert taken() == flatten(SftConfig())


def test_companions() -> None:
    config = {
        "fsdp_version": 2, "reshard_after_forward": False, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT",
        "activation_checkpointing": True, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
    }  # fmt: skip
    options = taken("--fsdp", "full_shard", "--fsdp_config", json.dumps(config))
    assert options[STRATEGY] == "optim_grads"
    assert options["gradient_checkpointing"] is True


def test_what_became_of_layers() -> None:
    words = ["--fsdp", "full_shard", "--fsdp_transformer_layer_cls_to_wrap", "Qwen3DecoderLayer,LlamaLayer"]
    config, given = parse(SftConfig, words)
    adoption = adopt(config, given)
    assert adoption is not None
    kinds = {str(setting.value): setting.kind for setting in adoption.settings}
    assert (kinds["Qwen3DecoderLayer"], kinds["LlamaLayer"]) == ("implied", "no counterpart")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fsdp2.json"
    path.write_text(json.dumps({"fsdp": "shard_grad_op auto_wrap", "fsdp_config": {"fsdp_version": 2}}))
    assert taken("--fsdp", str(path))[STRATEGY] == "optim_grads"
    path.write_text(json.dumps({"fsdp": "full_shard", "fsdp_confg": {}}))
    assert "unknown setting fsdp_confg" in refusal("--fsdp", str(path))
    path.write_text(json.dumps({"fsdp": 3}))
    assert "fsdp must be a string" in refusal("--fsdp", str(path))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--fsdp full_shart", "unknown word full_shart; did you mean full_shard?"),
        ("--fsdp hybrid_shard", "fsdp hybrid_shard: shards lie on all data-parallel ranks"),
        ("--fsdp full_shard offload", "fsdp offload: weights cannot be kept in CPU memory"),
        ("--fsdp full_shard no_shard", "full_shard and no_shard contradict each other"),
        ("--fsdp full_shard --deepspeed zero1", "--deepspeed and --fsdp both say what is sharded"),
        ("--fsdp --deepspeed zero1", "--deepspeed and --fsdp both say what is sharded"),
        ("--deepspeed zero1 --fsdp_config {}", "fsdp_config goes with --fsdp, not with --deepspeed"),
        ("--fsdp_config {}", "fsdp_config goes with --fsdp full_shard"),
        (
            "--fsdp_transformer_layer_cls_to_wrap Qwen3DecoderLayer",
            "fsdp_transformer_layer_cls_to_wrap goes with --fsdp full_shard",
        ),
        ("--fsdp --fsdp_config gone.json", "--fsdp_config gone.json cannot be read: No such file"),
        ('--fsdp --fsdp_config {"forward_prefech":true}', "did you mean forward_prefetch?"),
        ('--fsdp --fsdp_config {"offload_params":true}', "offload_params true: weights cannot be kept"),
        ('--fsdp --fsdp_config {"activation_checkpointing":1}', "activation_checkpointing must be true or"),
        ('--fsdp --fsdp_config {"min_num_params":[]}', "min_num_params must be one value, not []"),
        ('--fsdp --fsdp_config {"xla":true}', "xla true: there is no XLA here"),
        ("--fsdp no_shard --use_distributed_optimizer true", "contradicts fsdp no_shard of --fsdp"),
        (
            "--data_parallel_sharding_strategy no_shard --use_distributed_optimizer true",
            "contradicts --data_parallel_sharding_strategy no_shard",
        ),
    ],
)
def test_what_cannot_be_is_refused(words: str, named: str) -> None:
    assert named in refusal(*words.split())


def test_one_option_decides_the_other() -> None:
    assert taken("--" + STRATEGY, "no_shard")["use_distributed_optimizer"] is False
    assert taken("--" + STRATEGY, "optim")["use_distributed_optimizer"] is True
