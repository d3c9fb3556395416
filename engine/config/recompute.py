"""What recomputation can be asked for: by the command before anything starts, by a rank once it knows its
device.
"""

from engine.config.options import RecomputeOptions
from engine.errors import ConfigError

MLP_ACTIVATION = "mlp_act"
# Megatron's, and Braid's of dense layers.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "shared_experts", MLP_ACTIVATION)


def granularity_of(options: RecomputeOptions) -> str | None:
    """Megatron's granularity, from its own flag or transformers' switch."""
    return options.recompute_granularity or ("full" if options.gradient_checkpointing else None)


def check_recompute(options: RecomputeOptions, *, has_te: bool, fp8_recipe: str | None, lora: bool) -> None:
    """Raise ConfigError where the options contradict each other, ask for what layers without Transformer
    Engine (`has_te` false) do not have, or for what would change nothing.
    """
    granularity = granularity_of(options)
    if granularity != "selective" and options.recompute_modules:
        raise ConfigError("recompute_modules needs recompute_granularity selective")
    if granularity != "full" and (options.recompute_method or options.recompute_num_layers):
        raise ConfigError("recompute_method and recompute_num_layers need recompute_granularity full")
    if options.recompute_num_layers is not None and options.recompute_num_layers < 1:
        raise ConfigError(f"recompute_num_layers must be at least 1, not {options.recompute_num_layers}")
    for name in options.recompute_modules:
        if name not in RECOMPUTE_MODULES:
            known = ", ".join(RECOMPUTE_MODULES)
            raise ConfigError(f"recompute_modules {name!r} is not known; choose from {known}")
    # Adapters keep the product as it is, and what keeps it in fp8 is a linear whose weight is trained.
    if MLP_ACTIVATION in options.recompute_modules and fp8_recipe is not None and not lora:
        raise ConfigError(
            f"recompute_modules '{MLP_ACTIVATION}' does nothing with fp8_recipe {fp8_recipe} in full "
            f"training: Transformer Engine keeps its own copy in fp8; leave it out"
        )
    if "layernorm" not in options.recompute_modules:
        return
    # Megatron's code for norms that are computed again calls Transformer Engine, with fp8 or without.
    if not has_te:
        raise ConfigError("recompute_modules 'layernorm' needs Transformer Engine; leave it out")
    if fp8_recipe == "delayed":
        raise ConfigError(
            "recompute_modules 'layernorm' does not go with fp8_recipe delayed; take another recipe or "
            "leave it out"
        )
