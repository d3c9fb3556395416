"""The one place that knows which Megatron-Core is installed, and the only user of its `parallel_state`.

Megatron-Core 0.16.1 and 0.19.2 are supported. What differs between them, and what a CPU or a GPU without
Transformer Engine needs adapted, is done here, so that the rest of the engine calls one interface.
"""

import contextlib
import dataclasses
import functools
import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from engine.config.parallel import ParallelLayout
from engine.runtime.kernels import add_product
from engine.runtime.platform import Platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups of this rank, and its place in each."""

    layout: ParallelLayout
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    """Index of the replica; the context-parallel ranks of a replica share it."""

    cp_rank: int
    dp_cp_rank: int
    ep_rank: int
    etp_rank: int
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    """Data-parallel replicas with the same tensor, pipeline and context rank."""

    cp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    """All ranks with the same weights: gradients are reduced and optimizer states sharded over them."""

    expert_dp: dist.ProcessGroup
    """The same for the weights of experts."""

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def reports_loss(self) -> bool:
        """The ranks whose losses, added up, are the global batch's: one for each part of its tokens."""
        return self.is_last_stage and self.tp_rank == 0


def initialize(
    layout: ParallelLayout, platform: Platform, *, seed: int, deterministic: bool = False
) -> Groups:
    """Create Megatron's process groups over an initialised default group, and seed every generator.

    `deterministic` makes torch refuse kernels whose result depends on timing; CPU kernels are deterministic
    anyway.
    """
    from megatron.core import parallel_state

    adapt_megatron(platform)
    if deterministic and not platform.is_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # Second groups over gloo, for a way of saving that is not used here.
        create_gloo_process_groups=False,
    )
    seed_everything(seed)
    return Groups(
        layout=layout,
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=False),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(with_context_parallel=False),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
    )


def destroy() -> None:
    """Forget Megatron's process groups and buffers, so that another layout can be opened in the same
    process.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    parallel_state.destroy_model_parallel()
    with contextlib.suppress(AssertionError):
        unset_num_microbatches_calculator()
    # Megatron forgets some groups only when it makes new ones, and modules hold others in reference cycles;
    # each gloo group that lives on keeps three threads running.
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    gc.collect()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch alike on all ranks, and Megatron's tracker differently per model-parallel
    rank.
    """
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    # What draws outside of Megatron's tracker, the dropout of adapters, must not drop the same on every rank.
    # The device's own state is saved with checkpoints and put back by recomputation.
    torch.cuda.manual_seed(seed + 1 + 100003 * (1 + dist.get_rank()))


def rng_state() -> dict[str, Any]:
    """State of every random generator of this rank."""
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def adapt_megatron(platform: Platform) -> None:
    """Import Megatron, give it Braid's AdamW and torch's product for weight gradients, and quiet its import
    chatter. A second call changes nothing.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # Column-parallel backward overlaps its all-reduce with a GEMM only if kernels launch in order; without
    # sequence parallelism Megatron asserts this variable, with it it warns.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with _without_compiler() if platform.is_cpu else contextlib.nullcontext():
        import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
    import megatron.core.tensor_parallel.layers as linears
    import megatron.core.tensor_parallel.random as random

    # Megatron's linears add gradients to the buffer in the product itself where apex has a kernel for it;
    # torch has one too.
    linears.fused_weight_gradient_mlp_cuda = _WeightGradients
    linears._grad_accum_fusion_available = True
    if platform.is_cpu:
        random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    from engine.runtime.adam import FusedAdamW

    # One optimizer everywhere: its moments can be bf16 without Transformer Engine too.
    optimizer.Adam = distributed_optimizer.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_TE_OPTIMIZER = True


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Megatron has torch.compile take functions that Braid does not call, which alone imports torch's
    compiler: more than a second of every process on a CPU.
    """

    def leave(function: Any = None, **unused: Any) -> Any:
        return leave if function is None else function

    compiler, torch.compile = torch.compile, leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


class _WeightGradients:
    """What Megatron calls of apex's fused_weight_gradient_mlp_cuda."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grads: torch.Tensor, total: torch.Tensor) -> None:
        """Add the gradient of a weight, from inputs [T, in] and gradients of outputs [T, out], to its
        float32 buffer [out, in].
        """
        add_product(total, grads.T, inputs)


def known_fields(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` without the entries that this version's dataclass does not have."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in names}


@functools.cache
def norms_give_residuals() -> bool:
    """Whether Megatron's layers take the residual from a norm that returns it beside its result."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return "fused_residual_rmsnorm" in {field.name for field in dataclasses.fields(TransformerConfig)}


def virtual_stages(layout: ParallelLayout) -> Iterator[int | None]:
    """The `vp_stage` argument of each model chunk on this rank."""
    yield from range(layout.vpp) if layout.vpp > 1 else [None]


def stage_flags(vp_stage: int | None) -> tuple[bool, bool]:
    """Whether this rank's chunk holds the embedding, and whether it holds the LM head."""
    from megatron.core import parallel_state

    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
