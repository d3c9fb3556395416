"""What every setting of DeepSpeed that needs no thought is here. Pure data.

Names are dotted, as `zero_optimization.stage`. Settings that need thought are in deepspeed.py.
"""

from collections.abc import Mapping
from typing import Any

# Option with the same meaning, and type of the value. "auto" leaves it to the command line.
DIRECT: Mapping[str, tuple[str, type]] = {
    "gradient_clipping": ("max_grad_norm", float),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", int),
    "train_batch_size": ("global_batch_size", int),
    "zero_optimization.overlap_comm": ("overlap_grad_reduce", bool),
}

_BUCKETS = "Megatron chooses the sizes of its buckets"
_FULL_SHARDING = "a matter of memory and speed under full sharding"
IMPLIED: Mapping[str, str] = {
    "zero_optimization.contiguous_gradients": "gradients lie in one buffer",
    "zero_optimization.reduce_scatter": "sharded optimizers reduce-scatter",
    "zero_optimization.allgather_partitions": "updated weights are gathered by all-gather",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "hf/ is always a whole checkpoint",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "hf/ is always a whole checkpoint",
    "zero_optimization.elastic_checkpoint": "checkpoints fit every layout",
    "zero_optimization.load_from_fp32_weights": "checkpoints hold fp32 weights",
    "zero_optimization.ignore_unused_parameters": "no weight is unused",
    "checkpoint.load_universal": "checkpoints fit every layout",
    "load_universal_checkpoint": "checkpoints fit every layout",
    "fp32_allreduce": "gradients are reduced in fp32",
    "prescale_gradients": "sums are divided once, by the tokens of the global batch",
    "gradient_predivide_factor": "sums are divided once, by the tokens of the global batch",
    "zero_allow_untested_optimizer": "the optimizer is AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is AdamW",
    "optimizer.params.torch_adam": "AdamW is one implementation",
    "optimizer.params.fused": "AdamW is one implementation",
    "optimizer.params.adam_w_mode": "weight decay is decoupled",
    "fp16.initial_scale_power": "the scale starts at 2**8 and adapts",
    "fp16.auto_cast": "inputs are token ids",
}

_RECOMPUTE = "recomputation is gradient_checkpointing and recompute_*"
NO_COUNTERPART: Mapping[str, str] = {
    "steps_per_print": "Braid prints every logging_steps",
    "wall_clock_breakdown": "braid bench train --breakdown times the parts of a step",
    "dump_state": "args.yaml holds every setting",
    "memory_breakdown": "metrics.jsonl has the peak of memory",
    "disable_allgather": "a matter of speed",
    "use_node_local_storage": "output_dir is shared",
    "bf16.check_grad_overflow": "gradients are always checked (nonfinite)",
    "bf16.immediate_grad_update": "a matter of speed",
    "zero_optimization.reduce_bucket_size": _BUCKETS,
    "zero_optimization.allgather_bucket_size": _BUCKETS,
    "zero_optimization.round_robin_gradients": "a matter of speed",
    "zero_optimization.use_multi_rank_bucket_allreduce": "a matter of speed",
    "zero_optimization.use_all_reduce_for_fetch_params": "a matter of speed",
    "zero_optimization.legacy_stage1": "there is one ZeRO-1",
    "zero_optimization.memory_efficient_linear": "a matter of memory",
    "zero_optimization.log_trace_cache_warnings": "there is no trace",
    "zero_optimization.sub_group_size": _FULL_SHARDING,
    "zero_optimization.stage3_max_live_parameters": _FULL_SHARDING,
    "zero_optimization.stage3_max_reuse_distance": _FULL_SHARDING,
    "zero_optimization.stage3_prefetch_bucket_size": _FULL_SHARDING,
    "zero_optimization.stage3_param_persistence_threshold": _FULL_SHARDING,
    "zero_optimization.stage3_model_persistence_threshold": _FULL_SHARDING,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _FULL_SHARDING,
    "zero_optimization.stage3_module_granularity_threshold": _FULL_SHARDING,
    "zero_optimization.zero_hpz_partition_size": "where shards lie is a matter of speed",
    "zero_optimization.mics_shard_size": "where shards lie is a matter of speed",
    "zero_optimization.mics_hierarchical_params_gather": "where shards lie is a matter of speed",
    "activation_checkpointing.partition_activations": _RECOMPUTE,
    "activation_checkpointing.cpu_checkpointing": _RECOMPUTE,
    "activation_checkpointing.contiguous_memory_optimization": _RECOMPUTE,
    "activation_checkpointing.number_checkpoints": _RECOMPUTE,
    "activation_checkpointing.synchronize_checkpoint_boundary": _RECOMPUTE,
    "activation_checkpointing.profile": _RECOMPUTE,
    "checkpoint.tag_validation": "checkpoints are hashed",
    "checkpoint.use_node_local_storage": "output_dir is shared",
    "checkpoint.parallel_write": "every rank writes its part",
}

# Values that keep what is trained as it is, and what any other would mean.
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "communication_data_type": ((None, "fp32", "auto"), "gradients are reduced in fp32; leave it out"),
    "seq_parallel_communication_data_type": ((None, "fp32"), "it is not to be chosen; leave it out"),
    "data_types.grad_accum_dtype": ((None, "fp32", "auto"), "gradients are added up in fp32; leave it out"),
    "sparse_gradients": ((False,), "gradients are dense; leave it out"),
    "sequence_parallel_size": ((1,), "pass --context_parallel_size with --cp_comm_type a2a instead"),
    "tensor_parallel.autotp_size": ((0, 1), "pass --tensor_model_parallel_size instead"),
    "dataloader_drop_last": ((False, None), "every row is trained on; leave it out"),
    "torch_autocast.enabled": ((False,), "torch_dtype is the arithmetic of the run; leave it out"),
    "amp.enabled": ((False,), "there is no apex amp; use bf16 or fp16"),
    "optimizer.params.amsgrad": ((False,), "AMSGrad is another optimizer; leave it out"),
    "optimizer.params.bias_correction": ((True,), "AdamW corrects its moments; leave it out"),
    "optimizer.params.maximize": ((False,), "losses are minimised; leave it out"),
    "fp16.fp16_master_weights_and_grads": ((False,), "master weights are fp32; leave it out"),
    "fp16.consecutive_hysteresis": ((False,), "it is not to be chosen; leave it out"),
    "bf16.bf16_master_weights_and_grads": ((False,), "master weights are fp32; leave it out"),
    "zero_optimization.zero_quantized_weights": ((False,), "weights are not sent quantised; leave it out"),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (False,), "weights are not sent quantised; leave it out",
    ),
    "zero_optimization.zero_quantized_gradients": (
        (False,), "gradients are not sent quantised; leave it out",
    ),
    "zero_optimization.cpu_offload": ((False,), "write offload_optimizer, which took its place"),
    "zero_optimization.cpu_offload_params": ((False,), "write offload_param, which took its place"),
}  # fmt: skip

# Sections that change nothing that is trained, whatever stands in them.
WATCHING = (
    "flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor", "comms_logger", "aio", "autotuning",
    "hybrid_engine", "compile", "timers", "nebula",
)  # fmt: skip
# Sections that change what is trained unless they are off.
CHANGING = (
    "progressive_layer_drop", "curriculum_learning", "data_efficiency", "eigenvalue", "quantize_training",
    "compression_training", "sparse_attention", "elasticity", "weight_quantization",
)  # fmt: skip

OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
OFFLOAD_KEYS = (
    "device", "pin_memory", "buffer_count", "buffer_size", "fast_init", "ratio", "nvme_path",
    "pipeline_read", "pipeline_write", "pipeline", "max_in_cpu", "super_offload", "cpuadam_cores_perc",
)  # fmt: skip

# Settings that deepspeed.py thinks about.
SPECIAL = (
    "zero_optimization.stage", "bf16.enabled", "fp16.enabled", "bf16.bf16_optimizer_states",
    "fp16.loss_scale", "fp16.loss_scale_window", "fp16.hysteresis", "fp16.min_loss_scale",
    "optimizer.type", "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps",
    "optimizer.params.weight_decay", "scheduler.type", "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr", "scheduler.params.warmup_num_steps", "scheduler.params.warmup_type",
    "scheduler.params.total_num_steps", "scheduler.params.warmup_min_ratio", "scheduler.params.cos_min_ratio",
    "scheduler.params.last_batch_iteration",
)  # fmt: skip
WHOLE = (*WATCHING, *CHANGING, *OFFLOADS)
KNOWN = (*DIRECT, *IMPLIED, *NO_COUNTERPART, *ONLY, *SPECIAL, *WHOLE)
