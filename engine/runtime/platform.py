"""Where a run computes: CUDA with NCCL, or the CPU with gloo.

Megatron-Core names "cuda" in buffers, losses and scalers. On the CPU platform `install_cpu` redirects those
names, once per process, before Megatron is imported: factory functions and `.to` that ask for "cuda" give CPU
tensors, `.cuda()` is the identity, and the handful of `torch.cuda` calls that Megatron makes answer for the
CPU. Nothing of this is touched on the CUDA platform.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._device import _device_constructors

from engine.config.device import check_layers
from engine.config.options import ModelOptions
from engine.errors import ConfigError

# Factory functions that Megatron calls with device="cuda" (or the current device).
_FACTORIES = (
    "arange", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "rand_like", "randint", "randn", "randn_like", "tensor", "as_tensor", "zeros", "zeros_like", "frombuffer",
)  # fmt: skip
_CPU = torch.device("cpu")

# bf16 dense peak of a card in FLOP/s by the name that the driver reports; the basis of MFU.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The device of this process and what goes with it."""

    device: torch.device
    backend: Literal["nccl", "gloo"]
    dtype: torch.dtype
    """Arithmetic of the model."""

    use_te: bool
    """Layers come from Transformer Engine instead of plain torch."""

    fp8_recipe: str | None = None
    """How linears of decoder layers are scaled to fp8; None: they are not."""

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def peak_flops(self) -> float | None:
        """bf16 peak of the device in FLOP/s, or None where it is not known (never invented)."""
        if self.is_cpu or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name()
        return next((peak for card, peak in _PEAK_FLOPS.items() if card in name), None)

    def memory_gib(self) -> float | None:
        """Peak memory of this process in GiB: allocated on the device, or resident on the CPU."""
        if not self.is_cpu:
            return torch.cuda.max_memory_allocated() / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def open_platform_of(options: ModelOptions, local_rank: int) -> Platform:
    """`open_platform` as the options of a run have it."""
    return open_platform(
        device=options.device,
        dtype=options.torch_dtype,
        transformer_impl=options.transformer_impl,
        local_rank=local_rank,
        fp8_recipe=options.fp8_recipe,
    )


def open_platform(
    *,
    device: str,
    dtype: str | None,
    transformer_impl: str,
    local_rank: int,
    fp8_recipe: str | None = None,
) -> Platform:
    """Choose the device of this process and prepare torch for it. Raises ConfigError for what is missing."""
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch"
        )
    installed = importlib.util.find_spec("transformer_engine") is not None
    check_layers(
        transformer_impl=transformer_impl, fp8_recipe=fp8_recipe, on_cuda=on_cuda, te_installed=installed
    )
    name = dtype or ("bfloat16" if on_cuda else "float32")
    _silence_import_chatter()
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible; "
                f"lower NPROC_PER_NODE"
            )
        # Micro-batches have any number of tokens: without segments that grow, memory falls to pieces.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(local_rank)
    else:
        install_cpu()
    _share_cores()
    return Platform(
        device=torch.device("cuda", local_rank) if on_cuda else _CPU,
        backend="nccl" if on_cuda else "gloo",
        dtype=getattr(torch, name),
        use_te=on_cuda and installed and transformer_impl != "torch",
        fp8_recipe=fp8_recipe,
    )


def _silence_import_chatter() -> None:
    """Megatron warns at import about optional packages that Braid never needs."""
    patterns = (
        ".*[Aa]pex is not installed.*",
        ".*[Tt]ransformer[_ ][Ee]ngine.*",
        ".*is deprecated.*",
        ".*nvidia-resiliency.*",
        ".*argument order of load has been changed.*",
        ".*experimental and still under active development.*",
        # A converted checkpoint's metadata is read before there is a process group, on purpose.
        ".*torch.distributed is disabled, unavailable or uninitialized.*",
        # Megatron asks views of its gradient buffer whether they have a gradient.
        ".*grad attribute of a Tensor that is not a leaf.*",
    )
    for pattern in patterns:
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA build on a CPU
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _share_cores() -> None:
    """Give each local process its share of the cores: more threads than cores make small CPU runs many times
    slower, and the one thread that torchrun gives a process would make the optimizer on the host slow.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ or processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


class _NoStream:
    """Stands for a CUDA stream on the CPU, where everything is ordered already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "_NoStream"]:
        return lambda *args, **kwargs: self


@functools.cache
def install_cpu() -> None:
    """Redirect the CUDA names in torch to the CPU; idempotent. Call before importing megatron."""
    # `with torch.device("meta")` knows the factory functions by identity, from its first use on.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign]
    _redirect_torch_cuda()


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every CUDA device among its arguments replaced by the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = _CPU
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return function(*args, **kwargs)

    return call


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizer and clipping compare `tensor.type()` with torch.cuda.*Tensor names."""

    @functools.wraps(function)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return call


def _redirect_torch_cuda() -> None:
    """Replace the torch.cuda functions that Megatron calls; its random generator is the CPU's."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.current_stream = cuda.default_stream = lambda *args: _NoStream()
    cuda.Stream = _NoStream  # a class, for it stands in annotations
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    # Megatron seeds "the GPU" only; torch.manual_seed would call manual_seed_all back.
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.manual_seed_all = lambda seed: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
