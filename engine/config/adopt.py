"""Options that came as settings of DeepSpeed or FSDP, put in place. Pure Python."""

from collections.abc import Collection

from engine.config.adoption import Adoption, Request, same, show
from engine.config.deepspeed import adopt_deepspeed
from engine.config.fsdp import adopt_fsdp
from engine.config.options import OptimizerOptions, SftConfig
from engine.config.parse import flatten, options_of
from engine.errors import ConfigError


def adopt(config: SftConfig, given: Collection[str]) -> Adoption | None:
    """Set what `deepspeed` or `fsdp` ask for; None where neither is given. `given` are the names of the
    options that were set otherwise: one that says something else is a ConfigError.
    """
    foreign, options = config.foreign, config.optimizer
    if foreign.deepspeed is not None and foreign.fsdp is not None:
        raise ConfigError("--deepspeed and --fsdp both say what is sharded; give one of them")
    if foreign.deepspeed is not None:
        for name in ("fsdp_config", "fsdp_transformer_layer_cls_to_wrap"):
            if getattr(foreign, name):
                raise ConfigError(f"{name} goes with --fsdp, not with --deepspeed")
        adoption = adopt_deepspeed(foreign.deepspeed, config, given)
    else:
        adopted = adopt_fsdp(foreign)
        if adopted is None:
            settle_strategy(options, given)
            return None
        adoption = adopted
    for request in adoption.requests.values():
        _apply(request, adoption.source, config, given)
    if adoption.offloads_optimizer is not None:
        _offload(adoption, config)
    return adoption


def _apply(request: Request, source: str, config: SftConfig, given: Collection[str]) -> None:
    current = flatten(config)[request.option]
    if request.option in given and current is not None and not same(current, request.value):
        if request.default:
            return
        raise ConfigError(
            f"--{request.option} {show(current)} contradicts {request.by} of {source}, which makes it "
            f"{show(request.value)}; change one of them"
        )
    group = options_of(SftConfig)[request.option].group
    setattr(getattr(config, str(group)), request.option, request.value)


def _offload(adoption: Adoption, config: SftConfig) -> None:
    config.optimizer.optimizer_cpu_offload = True
    name, _, device = str(adoption.offloads_optimizer).rpartition(" ")
    adoption.note(name, device, "became", "optimizer_cpu_offload true")


def settle_strategy(options: OptimizerOptions, given: Collection[str]) -> None:
    """Two options say whether optimizer states are sharded; one that is given decides the other. Raises
    ConfigError where both are, and contradict each other.
    """
    strategy = options.data_parallel_sharding_strategy
    if strategy is None:
        return
    sharded = strategy != "no_shard"
    if "use_distributed_optimizer" in given and options.use_distributed_optimizer != sharded:
        raise ConfigError(
            f"--use_distributed_optimizer {show(options.use_distributed_optimizer)} contradicts "
            f"--data_parallel_sharding_strategy {strategy}; leave one of them out"
        )
    options.use_distributed_optimizer = sharded
