"""A DeepSpeed configuration becomes options, key by key, or is refused in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import deepspeed_keys as keys
from engine.config.adopt import adopt
from engine.config.adoption import Adoption
from engine.config.deepspeed import PRESETS
from engine.config.options import SftConfig
from engine.config.parse import flatten, options_of, parse
from engine.errors import ConfigError

# As people write them for the Trainer.
ZERO_2: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
        "hysteresis": 2, "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {
            "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
        "reduce_scatter": True, "reduce_bucket_size": "auto", "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
ZERO_3: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"},
        "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_clipping": 0.5,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "train_batch_size": 16,
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": True},
    "flops_profiler": {"enabled": True, "profile_step": 3},
    "curriculum_learning": {"enabled": False},
}  # fmt: skip


def taken(word: str, *argv: str) -> tuple[dict[str, Any], Adoption]:
    config, given = parse(SftConfig, ["--deepspeed", word, *argv])
    adoption = adopt(config, given)
    assert adoption is not None
    return flatten(config), adoption


def taken_of(settings: dict[str, Any], *argv: str) -> dict[str, Any]:
    return taken(json.dumps(settings), *argv)[0]


def refusal(word: str, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        taken(word, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_(settings: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The settings with one more, by its dotted name."""
    changed = copy.deepcopy(settings)
    place = changed
    *sections, key = name.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return changed


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("zero0", "no_shard"), ("zero1", "optim"), ("zero2", "optim_grads"), ("zero3", "optim_grads_params")],
)
def test_names(name: str, strategy: str) -> None:
    options, _ = taken(name)
    assert options["data_parallel_sharding_strategy"] == strategy
    assert options["use_distributed_optimizer"] is (name != "zero0")
    left = {key: value for key, value in options.items() if "shard" not in key and key != "deepspeed"}
    plain = flatten(SftConfig())
    changed = {key for key, value in left.items() if value != plain[key]}
    assert changed == ({"use_distributed_optimizer"} if name == "zero0" else set())


def test_offloading_keeps_the_optimizer_on_the_host() -> None:
    assert taken("zero2_offload")[0]["optimizer_cpu_offload"] is True
    settings = with_({}, "zero_optimization.stage", 1)
    settings = with_(settings, "zero_optimization.offload_optimizer", {"device": "cpu"})
    assert taken(json.dumps(settings))[0]["optimizer_cpu_offload"] is True
    assert taken("zero1")[0]["optimizer_cpu_offload"] is False
    assert "offload_param cpu: weights cannot be kept in CPU memory" in refusal("zero3_offload")


def test_zero_2_of_the_trainer() -> None:
    options = taken_of(ZERO_2, "--warmup_steps", "7", "--weight_decay", "0.01")
    assert options["data_parallel_sharding_strategy"] == "optim_grads"
    assert options["overlap_grad_reduce"] is options["overlap_param_gather"] is True
    assert options["lr_scheduler_type"] == "constant"
    # "auto" is what Braid was given, or its default.
    assert (options["warmup_steps"], options["weight_decay"], options["adam_beta2"]) == (7, 0.01, 0.95)
    assert options["torch_dtype"] is options["learning_rate"] is options["global_batch_size"] is None


def test_zero_3_of_the_trainer() -> None:
    options = taken_of(ZERO_3)
    assert options["data_parallel_sharding_strategy"] == "optim_grads_params"
    assert options["torch_dtype"] == "bfloat16"
    assert options["overlap_grad_reduce"] is options["overlap_param_gather"] is False
    assert options["max_grad_norm"] == 0.5
    assert options["per_device_train_batch_size"] == 2
    assert options["gradient_accumulation_steps"] == 4
    assert options["global_batch_size"] == 16


def test_every_setting_is_in_the_table_once_for_each_thing_it_became() -> None:
    for settings in (ZERO_2, ZERO_3):
        _, adoption = taken(json.dumps(settings))
        listed = {(setting.name, setting.text) for setting in adoption.settings}
        assert len(listed) == len(adoption.settings)
        from_file = {name for name, _ in keys_of(settings)}
        assert {name for name, _ in listed} == from_file


# One setting each, with what it needs beside it.
BENIGN: dict[str, Any] = {
    **{name: {bool: True, int: 2, float: 1.0}[kind] for name, (_, kind) in keys.DIRECT.items()},
    **dict.fromkeys((*keys.IMPLIED, *keys.NO_COUNTERPART), True),
    **{name: allowed[0] for name, (allowed, _) in keys.ONLY.items()},
    **{name: {"enabled": False} for name in (*keys.WATCHING, *keys.CHANGING)},
    **dict.fromkeys(keys.OFFLOADS, None),
    "zero_optimization.stage": 1, "bf16.enabled": False, "fp16.enabled": False,
    "bf16.bf16_optimizer_states": False, "fp16.loss_scale": 0, "fp16.loss_scale_window": 1000,
    "fp16.hysteresis": 2, "fp16.min_loss_scale": 1, "optimizer.type": "AdamW", "optimizer.params.lr": 1e-4,
    "optimizer.params.betas": [0.9, 0.95], "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.1, "scheduler.type": "WarmupLR", "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_max_lr": 1e-4, "scheduler.params.warmup_num_steps": 0,
    "scheduler.params.warmup_type": "log", "scheduler.params.total_num_steps": "auto",
    "scheduler.params.warmup_min_ratio": 0, "scheduler.params.cos_min_ratio": 0,
    "scheduler.params.last_batch_iteration": -1,
}  # fmt: skip
OF_COSINE = ("total_num_steps", "warmup_min_ratio", "cos_min_ratio")


@pytest.mark.parametrize("name", keys.KNOWN)
def test_every_known_setting_is_in_the_table(name: str) -> None:
    settings = with_({}, name, BENIGN[name])
    if name.startswith("optimizer."):
        settings = with_(settings, "optimizer.type", "AdamW")
    if name.startswith("scheduler."):
        cosine = name.rpartition(".")[2] in OF_COSINE
        settings = with_(settings, "scheduler.type", "WarmupCosineLR" if cosine else "WarmupLR")
        settings = with_(settings, "scheduler.params.warmup_num_steps", 0)
    _, adoption = taken(json.dumps(settings), "--learning_rate", "1e-4")
    assert name in {setting.name for setting in adoption.settings}


def keys_of(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    from engine.config.adoption import flat_settings

    return list(flat_settings(settings, keys.WHOLE))


def test_the_table() -> None:
    settings = {
        "zero_optimization": {"stage": 1, "contiguous_gradients": True, "reduce_bucket_size": 5e8},
        "gradient_clipping": 2,
    }
    _, adoption = taken(json.dumps(settings))
    assert adoption.table().splitlines() == [
        "settings of --deepspeed:",
        "  became",
        "    gradient_clipping 2                               max_grad_norm 2.0",
        "    zero_optimization.stage 1                         data_parallel_sharding_strategy optim",
        "    zero_optimization.stage 1                         use_distributed_optimizer true",
        "  implied",
        "    zero_optimization.contiguous_gradients true       gradients lie in one buffer",
        "  no counterpart",
        "    zero_optimization.reduce_bucket_size 500000000.0  Megatron chooses the sizes of its buckets",
    ]


def test_an_optimizer_section_brings_deepspeeds_defaults() -> None:
    options = taken_of({"optimizer": {"type": "Adam", "params": {"lr": 3e-4}}})
    assert options["learning_rate"] == 3e-4
    assert (options["adam_beta1"], options["adam_beta2"], options["adam_epsilon"]) == (0.9, 0.999, 1e-8)
    assert options["weight_decay"] == 0.0
    # What is not written contradicts nothing.
    assert taken_of({"optimizer": {"type": "AdamW"}}, "--adam_beta2", "0.98")["adam_beta2"] == 0.98


def test_coupled_decay_of_nothing_is_decoupled_decay_of_nothing() -> None:
    adam = {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0}}}
    assert taken_of(adam)["weight_decay"] == 0.0


def test_schedules() -> None:
    linear = {"warmup_num_steps": 10, "warmup_type": "linear"}
    decay = {"scheduler": {"type": "WarmupDecayLR", "params": {**linear, "total_num_steps": 100}}}
    options = taken_of(decay, "--max_steps", "100")
    assert (options["lr_scheduler_type"], options["warmup_steps"], options["min_lr"]) == ("linear", 10, 0.0)
    assert options["warmup_type"] == "linear"
    assert taken_of({"scheduler": {"type": "WarmupLR"}})["warmup_type"] == "log", "DeepSpeed's default"
    cosine = {"scheduler": {"type": "WarmupCosineLR", "params": {**linear, "cos_min_ratio": 0.1}}}
    options = taken_of(cosine, "--learning_rate", "1e-3")
    assert (options["lr_scheduler_type"], options["min_lr"]) == ("cosine", pytest.approx(1e-4))
    at_once = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0, "warmup_max_lr": 2e-5}}}
    options = taken_of(at_once)
    assert (options["lr_scheduler_type"], options["learning_rate"]) == ("constant", 2e-5)


CHANGED = [
    ("optimizer.type", "Lamb", "optimizer.type Lamb: Braid trains with AdamW"),
    ("optimizer.type", "OneBitAdam", "optimizer.type OneBitAdam"),
    ("optimizer.type", 3, "optimizer.type must be a string, not 3"),
    ("optimizer.params.amsgrad", True, "AMSGrad is another optimizer"),
    ("optimizer.params.betas", [0.9], "optimizer.params.betas must be two numbers"),
    ("optimizer.params.lr", "fast", "optimizer.params.lr must be a number, not fast"),
    ("optimizer.params.momentum", 0.9, "unknown setting optimizer.params.momentum"),
    ("scheduler.type", "OneCycle", "scheduler.type OneCycle: no such schedule here"),
    ("scheduler.params.warmup_type", "cubic", "scheduler.params.warmup_type cubic: write linear or log"),
    ("scheduler.params.warmup_min_lr", 1e-6, "scheduler.params.warmup_min_lr 1e-06: the warm-up begins at"),
    ("scheduler.params.total_num_steps", 50, "WarmupLR has no such parameter; remove it"),
    (
        "scheduler",
        {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 0, "total_num_steps": 50}},
        "pass --max_steps 50",
    ),
    ("zero_optimization.stage", 4, "zero_optimization.stage must be 0, 1, 2 or 3, not 4"),
    ("zero_optimization.stage", True, "zero_optimization.stage must be a whole number, not true"),
    ("zero_optimization.stage", "auto", "zero_optimization.stage must be a whole number, not auto"),
    ("zero_optimization.overlap_com", True, "did you mean zero_optimization.overlap_comm?"),
    ("zero_optimization.overlap_comm", 1, "zero_optimization.overlap_comm must be true or false, not 1"),
    ("zero_optimization.zero_quantized_gradients", True, "gradients are not sent quantised"),
    ("zero_optimization.offload_optimizer", {"device": "nvme"}, "offload_optimizer.device nvme: only cpu"),
    ("zero_optimization.offload_optimizer", {"devise": "cpu"}, "offload_optimizer.devise; did you mean dev"),
    ("zero_optimization.offload_optimizer", True, "offload_optimizer must be an object of settings"),
    ("zero_optimization.reduce_bucket_size", [1], "reduce_bucket_size must be one value, not [1]"),
    ("zero_optimization", 2, "zero_optimization must be an object of settings, not 2"),
    ("communication_data_type", "fp16", "communication_data_type fp16: gradients are reduced in fp32"),
    ("data_types.grad_accum_dtype", "bf16", "gradients are added up in fp32"),
    ("fp16.enabled", "yes", "fp16.enabled must be true or false, not yes"),
    ("amp.enabled", True, "there is no apex amp"),
    ("compression_training", {"weight_quantization": {}}, "compression_training"),
    ("progressive_layer_drop", {"enabled": True, "theta": 0.5}, "progressive_layer_drop"),
    ("gradient_clipping", "much", "gradient_clipping must be a number, not much"),
    ("gradient_clipping", True, "gradient_clipping must be a number, not true"),
    ("train_batch_size", 0, "train_batch_size must be at least 1, not 0"),
    ("train_batch_size", 1.5, "train_batch_size must be a whole number, not 1.5"),
    ("gradient_acumulation_steps", 2, "did you mean gradient_accumulation_steps?"),
]


@pytest.mark.parametrize(("name", "value", "named"), CHANGED)
def test_what_cannot_be_is_refused(name: str, value: Any, named: str) -> None:
    settings = with_(ZERO_2, name, value)
    said = refusal(json.dumps(settings))
    assert said.startswith("--deepspeed: ")
    assert named in said


@pytest.mark.parametrize(
    ("settings", "argv", "named"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "", "are both true"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "", "fp16.loss_scale 128: the loss scale adapts"),
        ({"fp16": {"enabled": "auto", "hysteresis": 4}}, "--torch_dtype float16", "fp16.hysteresis 4"),
        ({"optimizer": {"params": {"lr": 1e-4}}}, "", "optimizer.type must be a string, not null"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}},
            "",
            "weight decay is decoupled here",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": "auto"}}},
            "",
            "weight decay is decoupled here",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 0}}},
            "",
            "pass --learning_rate",
        ),
        (
            {
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0, "warmup_max_lr": 1e-3}},
            },
            "",
            "scheduler.params.warmup_max_lr 0.001 contradicts optimizer.params.lr 0.0001",
        ),
        (
            {"gradient_clipping": 1.0},
            "--max_grad_norm 2",
            "--max_grad_norm 2.0 contradicts gradient_clipping 1.0 of --deepspeed",
        ),
        (
            {"bf16": {"enabled": False}},
            "--torch_dtype bfloat16",
            "--torch_dtype bfloat16 contradicts bf16.enabled false of --deepspeed, which makes it float32",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            "--use_distributed_optimizer true",
            "--use_distributed_optimizer true contradicts zero_optimization.stage 0",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
            "--lr_scheduler_type cosine",
            "--lr_scheduler_type cosine contradicts scheduler.type WarmupLR",
        ),
    ],
)
def test_contradictions(settings: dict[str, Any], argv: str, named: str) -> None:
    assert named in refusal(json.dumps(settings), *argv.split())


def test_what_agrees_with_the_command_line_is_taken() -> None:
    argv = ("--max_grad_norm", "0.5", "--torch_dtype", "bfloat16", "--global_batch_size", "16")
    assert taken_of(ZERO_3, *argv)["max_grad_norm"] == 0.5


def test_a_recorded_run_can_be_repeated() -> None:
    """args.yaml has every option, those that came from DeepSpeed among them."""
    config, given = parse(SftConfig, ["--deepspeed", json.dumps(ZERO_3), "--learning_rate", "1e-4"])
    adopt(config, given)
    recorded = flatten(config)
    again, _ = parse(SftConfig, [], {})
    for name, value in recorded.items():
        group = options_of(SftConfig)[name].group
        setattr(getattr(again, str(group)), name, value)
    adopt(again, set(recorded))
    assert flatten(again) == recorded


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "is not JSON"),
        (b"[]", "must hold a JSON object of settings, not []"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "it is not UTF-8 text"),
        (b'{"bf16": {}, "bf16": {}}', "'bf16' stands in it twice"),
        (b'{"gradient_clipping": NaN}', "NaN is not a number"),
        (b'{"gradient_clipping": 1e999}', "gradient_clipping must be a number"),
        (b'{"gradient_clipping": 1' + b"0" * 400 + b"}", "gradient_clipping must be a number"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"x": "' + b" " * 2**20 + b'"}', "that is no configuration"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    said = refusal(str(path))
    assert named in said
    assert str(path) in said


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(str(tmp_path / "gone.json"))
    (tmp_path / "folder.json").mkdir()
    assert "is not a file" in refusal(str(tmp_path / "folder.json"))
    assert "--deepspeed zero22 is neither a JSON file nor one of zero0" in refusal("zero22")
    assert "did you mean zero2?" in refusal("zero22")


def test_tables_name_options_that_there_are() -> None:
    options = options_of(SftConfig)
    assert {option for option, _ in keys.DIRECT.values()} <= options.keys()
    assert len(keys.KNOWN) == len(set(keys.KNOWN))
    assert set(PRESETS) == {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}


VALUES = (
    None, True, False, 0, 1, -1, 2**70, 1.5, 1e308, "", "auto", "cpu", "a\nb", [], [0.9, "x"], {},
    {"device": []}, {"enabled": []}, {"a\nb": {"c": None}},
)  # fmt: skip
NAMES = (*keys.KNOWN, "zero_optimization", "optimizer.params", "x\ny")


@hypothesis.settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=4))
def test_any_values_are_taken_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    for name in sorted(changes, reverse=True):
        settings = with_(settings, name, changes[name])
    try:
        taken(json.dumps(settings))
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most are refused
