"""What `--fsdp` and its companions ask for, in options. Pure Python."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.adoption import Adoption, nearest_name, read_json, show, typed
from engine.config.options import ForeignOptions
from engine.errors import ConfigError

_STRATEGIES: Mapping[str, str] = {
    "full_shard": "optim_grads_params",
    "shard_grad_op": "optim_grads",
    "no_shard": "no_shard",
    "fsdp2": "optim_grads_params",
    "true": "optim_grads_params",
}
_HYBRID = ("hybrid_shard", "hybrid_shard_zero2")
_WORDS = (*_STRATEGIES, *_HYBRID, "offload", "auto_wrap", "false")
DECODER_LAYERS = ("Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer")

_IMPLIED: Mapping[str, str] = {
    "version": "Megatron-FSDP shards every parameter for itself",
    "use_orig_params": "Megatron-FSDP shards every parameter for itself",
    "sync_module_states": "every rank reads its own part of the checkpoint",
    "cpu_ram_efficient_loading": "every rank reads its own part of the checkpoint",
    "state_dict_type": "checkpoints are sharded, hf/ is whole",
}
_NO_COUNTERPART: Mapping[str, str] = {
    "auto_wrap_policy": "units are the decoder layers",
    "min_num_params": "units are the decoder layers",
    "backward_prefetch": "a matter of speed",
    "forward_prefetch": "a matter of speed",
    "limit_all_gathers": "a matter of speed",
}
_KNOWN = (
    *_IMPLIED, *_NO_COUNTERPART, "transformer_layer_cls_to_wrap", "activation_checkpointing",
    "reshard_after_forward", "cpu_offload", "offload_params", "xla", "xla_fsdp_settings",
    "xla_fsdp_grad_ckpt",
)  # fmt: skip


def adopt_fsdp(options: ForeignOptions) -> Adoption | None:
    """Read the options; None where FSDP is not wanted. Raises ConfigError."""
    words = [part for word in options.fsdp or () for part in word.replace(",", " ").split()]
    config: dict[str, Any] = {}
    source = "--fsdp"
    if len(words) == 1 and words[0].endswith(".json"):
        source = words[0]
        words, config = _read_file(words[0])
    elif options.fsdp == []:  # --fsdp without a word
        words = ["true"]
    if not words or words == ["false"]:
        for name in ("fsdp_config", "fsdp_transformer_layer_cls_to_wrap"):
            if getattr(options, name):
                raise ConfigError(f"{name} goes with --fsdp full_shard, which is not given")
        return None
    if options.fsdp_config is not None:
        config |= read_json(options.fsdp_config, "--fsdp_config")
    adoption = Adoption(source=source)
    config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    _strategy(adoption, words, config)
    if options.fsdp_transformer_layer_cls_to_wrap:
        _layers(adoption, options.fsdp_transformer_layer_cls_to_wrap)
    for name, value in config.items():
        _setting(adoption, name, value)
    return adoption


def _read_file(path: str) -> tuple[list[str], dict[str, Any]]:
    """The words and the settings of a file with `fsdp` and `fsdp_config`."""
    content = read_json(path, "--fsdp")
    for name in content:
        if name not in ("fsdp", "fsdp_config"):
            raise ConfigError(f"{path}: unknown setting {show(name)}; it holds fsdp and fsdp_config")
    words, config = content.get("fsdp", "full_shard"), content.get("fsdp_config", {})
    if isinstance(words, bool):
        words = show(words)
    if not isinstance(words, str) or not isinstance(config, dict):
        raise ConfigError(f"{path}: fsdp must be a string, and fsdp_config an object of settings")
    return words.replace(",", " ").split(), config


def _strategy(adoption: Adoption, words: Sequence[str], config: Mapping[str, Any]) -> None:
    named = []
    for word in (word.lower() for word in words):
        if word not in _WORDS:
            raise ConfigError(
                f"{adoption.source}: unknown word {show(word)}{nearest_name(word, _WORDS)}; words are "
                f"{', '.join(_WORDS)}"
            )
        if word in _HYBRID:
            raise adoption.refuse("fsdp", word, "shards lie on all data-parallel ranks; write full_shard")
        if word == "offload":
            raise adoption.refuse("fsdp", word, "weights cannot be kept in CPU memory; leave it out")
        if word == "auto_wrap":
            adoption.note("fsdp", word, "implied", "units are the decoder layers")
        elif word != "false":
            named.append(word)
    if len({_STRATEGIES[word] for word in named}) > 1:
        raise ConfigError(f"{adoption.source}: {' and '.join(named)} contradict each other; write one")
    word = named[0] if named else "full_shard"
    strategy = _STRATEGIES[word]
    if config.get("reshard_after_forward") in (False, "false", "SHARD_GRAD_OP") and word != "no_shard":
        strategy = "optim_grads"
    adoption.became("fsdp", word, "data_parallel_sharding_strategy", strategy)
    adoption.became("fsdp", word, "use_distributed_optimizer", strategy != "no_shard")


def _layers(adoption: Adoption, names: Sequence[str]) -> None:
    for name in (part for word in names for part in word.split(",") if part):
        if name in DECODER_LAYERS:
            adoption.note("transformer_layer_cls_to_wrap", name, "implied", "units are the decoder layers")
        else:
            adoption.note(
                "transformer_layer_cls_to_wrap", name, "no counterpart", "units are the decoder layers"
            )


def _setting(adoption: Adoption, name: str, value: Any) -> None:
    if name not in _KNOWN:
        raise ConfigError(f"{adoption.source}: unknown setting {show(name)}{nearest_name(name, _KNOWN)}")
    if name == "transformer_layer_cls_to_wrap":
        names = value if isinstance(value, list) else [value]
        _layers(adoption, [typed(adoption, name, one, str) for one in names])
    elif name == "activation_checkpointing":
        wanted = typed(adoption, name, value, bool)
        if wanted:
            adoption.became(name, value, "gradient_checkpointing", True)
        else:
            adoption.note(name, value, "implied", "gradient_checkpointing as given to Braid")
    elif name in ("cpu_offload", "offload_params"):
        if typed(adoption, name, value, bool):
            raise adoption.refuse(name, value, "weights cannot be kept in CPU memory; write false")
        adoption.note(name, value, "implied", "nothing is offloaded")
    elif name.startswith("xla"):
        if value not in (False, {}, None):
            raise adoption.refuse(name, value, "there is no XLA here; leave it out")
        adoption.note(name, value, "implied", "there is no XLA here")
    elif name == "reshard_after_forward":
        if not isinstance(value, bool | str):
            raise ConfigError(f"{adoption.source}: {name} must be true or false, not {show(value)}")
        adoption.note(name, value, "implied", "weights are sharded" if value else "weights stay gathered")
    elif isinstance(value, dict | list):
        raise ConfigError(f"{adoption.source}: {name} must be one value, not {show(value)}")
    elif name in _IMPLIED:
        adoption.note(name, value, "implied", _IMPLIED[name])
    else:
        adoption.note(name, value, "no counterpart", _NO_COUNTERPART[name])
