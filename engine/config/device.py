"""What layers need of a device: asked on paper before anything starts, and by a rank that knows its own."""

from engine.errors import ConfigError


def check_layers(*, transformer_impl: str, fp8_recipe: str | None, on_cuda: bool, te_installed: bool) -> None:
    """Raise ConfigError for layers that the device does not have: Transformer Engine's, and fp8 in them."""
    have_te = on_cuda and te_installed
    if transformer_impl == "te" and not have_te:
        missing = "is not installed" if on_cuda else "needs CUDA"
        raise ConfigError(f"transformer_impl te: Transformer Engine {missing}; use --transformer_impl torch")
    if fp8_recipe is not None and (transformer_impl == "torch" or not have_te):
        raise ConfigError(
            f"fp8_recipe {fp8_recipe} needs Transformer Engine on a GPU; install it or leave fp8_recipe out"
        )
