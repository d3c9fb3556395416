"""What a DeepSpeed configuration asks for, in options. Pure Python; keys without thought in them are in
deepspeed_keys.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

from engine.config import deepspeed_keys as keys
from engine.config.adoption import Adoption, flat_settings, nearest_name, read_json, show, typed
from engine.config.options import SftConfig
from engine.errors import ConfigError

AUTO = "auto"
_OFF: Mapping[str, Any] = {"device": "cpu"}
# What --deepspeed NAME stands for.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": _OFF},
    "zero3": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": _OFF, "offload_param": _OFF},
}
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
# Megatron's dynamic loss scale.
_LOSS_SCALE = {"loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
# What DeepSpeed's AdamW does where a parameter is not written.
_ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}


def adopt_deepspeed(word: str, config: SftConfig, given: Collection[str]) -> Adoption:
    """Read `--deepspeed WORD`, a name, a JSON file or JSON. Raises ConfigError."""
    if word in PRESETS:
        adoption = Adoption(source=f"--deepspeed {word}")
        content: Mapping[str, Any] = {"zero_optimization": PRESETS[word]}
    else:
        if not word.lstrip().startswith("{") and not word.endswith(".json"):
            raise ConfigError(
                f"--deepspeed {show(word)} is neither a JSON file nor one of {', '.join(PRESETS)}"
                f"{nearest_name(word, tuple(PRESETS))}"
            )
        content = read_json(word, "--deepspeed")
        adoption = Adoption(source="--deepspeed" if word.lstrip().startswith("{") else word)
    settings = dict(flat_settings(content, keys.WHOLE))
    for name in settings:
        _check_name(adoption, name, settings[name])
    for name, value in settings.items():
        _plain(adoption, name, value)
    _sharding(adoption, settings)
    _arithmetic(adoption, settings, config, given)
    _optimizer(adoption, settings, config, given)
    _schedule(adoption, settings, config, given)
    return adoption


def _check_name(adoption: Adoption, name: str, value: Any) -> None:
    if name in keys.KNOWN:
        return
    if any(known.startswith(f"{name}.") for known in keys.KNOWN):
        raise ConfigError(f"{adoption.source}: {name} must be an object of settings, not {show(value)}")
    raise ConfigError(f"{adoption.source}: unknown setting {show(name)}{nearest_name(name, keys.KNOWN)}")


def _plain(adoption: Adoption, name: str, value: Any) -> None:
    """The settings that tables decide."""
    if name in keys.DIRECT:
        option, kind = keys.DIRECT[name]
        if value == AUTO:
            adoption.note(name, value, "implied", f"{option} as given to Braid")
        else:
            wanted = typed(adoption, name, value, kind)
            if kind is int and wanted < 1:
                raise ConfigError(f"{adoption.source}: {name} must be at least 1, not {wanted}")
            adoption.became(name, value, option, wanted)
    elif name in keys.ONLY:
        allowed, why = keys.ONLY[name]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise adoption.refuse(name, value, why)
        adoption.note(name, value, "implied", "as Braid does")
    elif name in keys.WATCHING or name in keys.CHANGING:
        enabled = bool(value.get("enabled", name != "aio")) if isinstance(value, dict) else bool(value)
        if enabled and name in keys.CHANGING:
            raise adoption.refuse(name, value, "it changes what is trained and has no counterpart; remove it")
        adoption.note(name, value, "no counterpart", "off" if not enabled else "changes nothing trained")
    elif name in keys.IMPLIED or name in keys.NO_COUNTERPART:
        if isinstance(value, dict | list):
            raise ConfigError(f"{adoption.source}: {name} must be one value, not {show(value)}")
        known = keys.IMPLIED.get(name)
        if name != "optimizer.params.adam_w_mode":  # thought about with the optimizer
            adoption.note(
                name, value, "implied" if known else "no counterpart", known or keys.NO_COUNTERPART[name]
            )


def _sharding(adoption: Adoption, settings: Mapping[str, Any]) -> None:
    """ZeRO's stage and what it offloads. Without a stage DeepSpeed shards nothing."""
    name = "zero_optimization.stage"
    value = settings.get(name, 0)
    stage = typed(adoption, name, value, int)
    if stage not in range(4):
        raise ConfigError(f"{adoption.source}: {name} must be 0, 1, 2 or 3, not {stage}")
    adoption.became(name, value, "data_parallel_sharding_strategy", STRATEGIES[stage])
    adoption.became(name, value, "use_distributed_optimizer", stage > 0)
    overlap = settings.get("zero_optimization.overlap_comm", AUTO)
    if overlap != AUTO:
        adoption.became("zero_optimization.overlap_comm", overlap, "overlap_param_gather", overlap)
    for name in keys.OFFLOADS:
        if name in settings:
            _offload(adoption, name, {} if settings[name] is None else settings[name])


def _offload(adoption: Adoption, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{adoption.source}: {name} must be an object of settings, not {show(value)}")
    for key in value:
        if key not in keys.OFFLOAD_KEYS:
            near = nearest_name(key, keys.OFFLOAD_KEYS)
            raise ConfigError(f"{adoption.source}: unknown setting {name}.{show(key)}{near}")
    device = value.get("device", "none")
    if device == "none":
        adoption.note(name, device, "implied", "nothing is offloaded")
    elif device != "cpu":
        raise adoption.refuse(f"{name}.device", device, "only cpu memory takes optimizer states; write cpu")
    elif name.endswith("offload_param"):
        raise adoption.refuse(
            name, device, "weights cannot be kept in CPU memory; write none, or shard them over more GPUs"
        )
    else:
        adoption.offloads_optimizer = f"{name} {device}"


def _arithmetic(
    adoption: Adoption, settings: Mapping[str, Any], config: SftConfig, given: Collection[str]
) -> None:
    """bf16 and fp16, and the loss scale where it matters."""
    wanted: dict[str, Any] = {}
    for name, half in (("bf16.enabled", "bfloat16"), ("fp16.enabled", "float16")):
        if name not in settings:
            continue
        value = settings[name]
        wanted[half] = value if value == AUTO else typed(adoption, name, value, bool)
        if value == AUTO or not value:
            text = "torch_dtype as given to Braid" if value == AUTO else f"torch_dtype is not {half}"
            adoption.note(name, value, "implied", text)
    if all(wanted.get(half) is True for half in ("bfloat16", "float16")):
        raise ConfigError(f"{adoption.source}: bf16.enabled and fp16.enabled are both true; choose one")
    dtype = next((dtype for dtype, on in wanted.items() if on is True), None)
    if dtype is not None:
        name = "bf16.enabled" if dtype == "bfloat16" else "fp16.enabled"
        adoption.became(name, True, "torch_dtype", dtype)
    elif wanted and AUTO not in wanted.values():
        name = "bf16.enabled" if "bfloat16" in wanted else "fp16.enabled"
        adoption.became(name, False, "torch_dtype", "float32")
    name = "bf16.bf16_optimizer_states"
    if name in settings:
        stored = "bfloat16" if typed(adoption, name, settings[name], bool) else "float32"
        for option in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            adoption.became(name, settings[name], option, stored)
    in_fp16 = (dtype or (config.model.torch_dtype if "torch_dtype" in given else None)) == "float16"
    _loss_scale(adoption, settings, in_fp16)


def _loss_scale(adoption: Adoption, settings: Mapping[str, Any], in_fp16: bool) -> None:
    for key, ours in {"loss_scale": 0, **_LOSS_SCALE}.items():
        name = f"fp16.{key}"
        if name not in settings:
            continue
        value = typed(adoption, name, settings[name], float)
        if not in_fp16:
            adoption.note(name, settings[name], "implied", "without fp16 losses are not scaled")
        elif value != ours:
            raise adoption.refuse(
                name, settings[name], f"the loss scale adapts as with {ours}; write {ours} or leave it out"
            )
        else:
            adoption.note(name, settings[name], "implied", "the loss scale adapts like this")


def _optimizer(
    adoption: Adoption, settings: Mapping[str, Any], config: SftConfig, given: Collection[str]
) -> None:
    """AdamW, with DeepSpeed's defaults for what an optimizer section leaves out."""
    if not any(name.startswith("optimizer.") for name in settings):
        return
    kind = typed(adoption, "optimizer.type", settings.get("optimizer.type"), str)
    if kind.lower() not in ("adam", "adamw"):
        raise adoption.refuse("optimizer.type", kind, "Braid trains with AdamW; write AdamW")
    adoption.note("optimizer.type", kind, "implied", "the optimizer is AdamW")
    numbers = ("lr", "eps", "weight_decay")
    options = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
    for key in numbers:
        name, option = f"optimizer.params.{key}", options[key]
        value, written = settings.get(name, _ADAM[key]), name in settings
        if value == AUTO:
            adoption.note(name, value, "implied", f"{option} as given to Braid")
        elif written or option not in given:
            wanted = typed(adoption, name, value, float)
            adoption.became(name, value, option, wanted, default=not written)
    _betas(adoption, settings, given)
    decoupled = settings.get("optimizer.params.adam_w_mode", True)
    name = "optimizer.params.adam_w_mode"
    if not typed(adoption, name, decoupled, bool) and kind.lower() == "adam":
        request = adoption.requests.get("weight_decay")
        if (request.value if request is not None else config.optimizer.weight_decay) != 0:
            raise adoption.refuse(
                name, decoupled, "weight decay is decoupled here; write true, or a weight_decay of 0"
            )
    if name in settings:
        adoption.note(name, decoupled, "implied", "weight decay is decoupled, or 0")


def _betas(adoption: Adoption, settings: Mapping[str, Any], given: Collection[str]) -> None:
    name = "optimizer.params.betas"
    value, written = settings.get(name, _ADAM["betas"]), name in settings
    if value == AUTO:
        adoption.note(name, value, "implied", "adam_beta1 and adam_beta2 as given to Braid")
        return
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"{adoption.source}: {name} must be two numbers, not {show(value)}")
    for option, beta in zip(("adam_beta1", "adam_beta2"), value, strict=True):
        if written or option not in given:
            wanted = typed(adoption, name, beta, float)
            adoption.became(name, value, option, wanted, default=not written)


_SHAPES: Mapping[str, str] = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_OF_ALL = ("warmup_num_steps", "warmup_type", "last_batch_iteration")
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "WarmupLR": (*_OF_ALL, "warmup_min_lr", "warmup_max_lr"),
    "WarmupDecayLR": (*_OF_ALL, "warmup_min_lr", "warmup_max_lr", "total_num_steps"),
    "WarmupCosineLR": (*_OF_ALL, "warmup_min_ratio", "cos_min_ratio", "total_num_steps"),
}
# Parameters of each scheduler that say how it begins: at zero, here.
_BEGINNINGS = ("warmup_min_lr", "warmup_min_ratio")


def _schedule(
    adoption: Adoption, settings: Mapping[str, Any], config: SftConfig, given: Collection[str]
) -> None:
    """A warm-up and what follows it, where Braid has the same."""
    if not any(name.startswith("scheduler.") for name in settings):
        return
    kind = typed(adoption, "scheduler.type", settings.get("scheduler.type"), str)
    if kind not in _SHAPES:
        raise adoption.refuse(
            "scheduler.type", kind, f"no such schedule here; write one of {', '.join(_SHAPES)}, or remove it"
        )
    prefix = "scheduler.params."
    for name in settings:
        if name.startswith(prefix) and name.removeprefix(prefix) not in _PARAMETERS[kind]:
            raise adoption.refuse(name, settings[name], f"{kind} has no such parameter; remove it")
    adoption.became("scheduler.type", kind, "lr_scheduler_type", _SHAPES[kind])
    for key in _BEGINNINGS:
        name = f"scheduler.params.{key}"
        value = settings.get(name, 0)
        if value != AUTO and typed(adoption, name, value, float) != 0:
            raise adoption.refuse(name, value, "the warm-up begins at zero; write 0")
        if name in settings:
            adoption.note(name, value, "implied", "the warm-up begins at zero")
    name = "scheduler.params.last_batch_iteration"
    if settings.get(name, -1) != -1:
        raise adoption.refuse(name, settings[name], "a resumed run goes on where it was; leave it out")
    if name in settings:
        adoption.note(name, -1, "implied", "a resumed run goes on where it was")
    _warmup(adoption, settings)
    _end_of_schedule(adoption, settings, given)
    if kind == "WarmupCosineLR":
        _cosine(adoption, settings, config)


def _warmup(adoption: Adoption, settings: Mapping[str, Any]) -> None:
    """Its length, its shape and the learning rate at its end."""
    name = "scheduler.params.warmup_max_lr"
    value = settings.get(name, AUTO)
    if value != AUTO:
        adoption.became(name, value, "learning_rate", typed(adoption, name, value, float))
    elif name in settings:
        adoption.note(name, AUTO, "implied", "learning_rate as given to Braid")
    name = "scheduler.params.warmup_num_steps"
    steps = settings.get(name, 1000)
    if steps == AUTO:
        adoption.note(name, steps, "implied", "warmup_steps or warmup_ratio as given to Braid")
    else:
        wanted = typed(adoption, name, steps, int)
        adoption.became(name, steps, "warmup_steps", wanted)
    name = "scheduler.params.warmup_type"
    shape = settings.get(name, "log")
    if steps == 0:
        if name in settings:
            adoption.note(name, shape, "implied", "there is no warm-up")
        return
    if shape not in ("linear", "log"):
        raise adoption.refuse(name, shape, "write linear or log")
    adoption.became(name, shape, "warmup_type", shape, default=name not in settings)


def _end_of_schedule(adoption: Adoption, settings: Mapping[str, Any], given: Collection[str]) -> None:
    name = "scheduler.params.total_num_steps"
    if name not in settings:
        return
    value = settings[name]
    if value == AUTO:
        adoption.note(name, value, "implied", "the schedule ends with the run")
        return
    steps = typed(adoption, name, value, int)
    if "max_steps" not in given:
        raise adoption.refuse(name, value, f"the schedule ends with the run; pass --max_steps {steps}")
    adoption.became(name, value, "max_steps", steps)


def _cosine(adoption: Adoption, settings: Mapping[str, Any], config: SftConfig) -> None:
    """DeepSpeed's end is a share of the peak."""
    name = "scheduler.params.cos_min_ratio"
    share = typed(adoption, name, settings.get(name, 1e-4), float)
    request = adoption.requests.get("learning_rate")
    peak = request.value if request is not None else config.optimizer.learning_rate
    if peak is None:
        raise adoption.refuse(name, share, "the end is a share of the peak; pass --learning_rate")
    adoption.became(name, share, "min_lr", share * peak, default=name not in settings)
