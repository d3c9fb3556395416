"""The options of a command, one keyword-only dataclass per concern.

Field names are the flags (`--learning_rate`) and the YAML keys (`learning_rate:`). The string under a field
is its help text: `braid sft --help` prints it, so it is written once.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class ModelOptions:
    """Which checkpoint is trained, and in which arithmetic."""

    model: str | None = None
    """Directory of a Hugging Face Qwen checkpoint (config.json, safetensors, tokenizer), or the id of one,
    such as Qwen/Qwen2.5-7B-Instruct; see use_hf.
    """

    train_type: Literal["full", "lora"] = "full"
    """Train every weight, or LoRA adapters."""

    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Arithmetic of the run; the optimizer keeps fp32 master weights. Default: bfloat16 on CUDA, float32 on
    CPU.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto takes CUDA where a GPU is visible."""

    transformer_impl: Literal["auto", "torch", "te"] = "auto"
    """Layers of plain torch, or of Transformer Engine where it is installed (auto: on CUDA, where it
    imports).
    """

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] | None = None
    """Linears of decoder layers in fp8, scaled by the largest values of earlier steps (delayed), of each
    tensor, or of each block; needs Transformer Engine. Default: none.
    """


@dataclass(kw_only=True)
class LoraOptions:
    """The adapter of train_type lora; words and meaning are PEFT's."""

    adapter: str | None = None
    """Directory of a PEFT LoRA adapter to go on from; it brings its own rank, alpha, dropout and targets."""

    lora_rank: int = 8
    """Rank of the adapter matrices."""

    lora_alpha: float = 32.0
    """The adapter counts lora_alpha / lora_rank times."""

    lora_dropout: float = 0.05
    """Share of an adapter's inputs that is dropped in training."""

    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Which linears get an adapter: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, a regular
    expression for whole names such as model.layers.0.mlp.up_proj, or all-linear.
    """

    target_parameters: list[str] = field(default_factory=list)
    """Which matrices of routed experts get an adapter each: mlp.experts.gate_up_proj mlp.experts.down_proj;
    in dense layers of a Qwen3-MoE mlp.gate_proj.weight and its like. All of them with target_modules
    all-linear.
    """

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_rank) (rank-stabilised LoRA)."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks by name or regular expression, where they differ from lora_rank; JSON on the command line."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas by name or regular expression, where they differ from lora_alpha; JSON on the command line."""


@dataclass(kw_only=True)
class DataOptions:
    """Rows and how they become token sequences."""

    dataset: list[str] = field(default_factory=list)
    """JSONL, JSON or Parquet files, or ids of Hugging Face or ModelScope; `name#N` samples N rows."""

    use_hf: bool | None = None
    """Look ids of models and data sets up at Hugging Face, or (false) at ModelScope. Default: at ModelScope
    where its package is installed.
    """

    columns: dict[str, str] = field(default_factory=dict)
    """Keys of rows and what Braid calls them, such as {"question": "query", "answer": "response"}; JSON on
    the command line.
    """

    interleave_prob: list[float] = field(default_factory=list)
    """Draw rows from the data sets by these probabilities, one for each, in place of taking all of them."""

    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """When interleave_prob ends: when the first data set runs out, or when all have been through once."""

    val_dataset: list[str] = field(default_factory=list)
    """Files for evaluation; overrides split_dataset_ratio."""

    split_dataset_ratio: float | None = None
    """Share of the rows of `dataset` held out for evaluation, 0 <= ratio < 1. Default: 0.01 where eval_steps
    asks for evaluations and there is no val_dataset, otherwise 0.
    """

    system: str | None = None
    """System message for rows that bring none."""

    streaming: bool = False
    """Read and tokenise rows while training runs; needs max_steps."""

    shuffle_buffer_size: int = 1000
    """Rows that a stream holds, packs and shuffles at a time."""

    max_length: int = 2048
    """Longest sequence, in tokens."""

    truncation_strategy: Literal["delete", "left", "right"] = "delete"
    """What happens to a row longer than max_length: drop it, cut its start, or cut its end."""

    packing: bool = False
    """Pack rows into sequences of max_length; attention stays within a row. Batch sizes then count packs."""

    dataloader_num_workers: int = 1
    """Background threads that assemble micro-batches ahead of the step; 0 assembles them in the step."""


@dataclass(kw_only=True)
class BatchOptions:
    """How rows become steps."""

    num_train_epochs: float = 1.0
    """Passes over the rows; a fraction ends within a pass."""

    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs. 0 checks, saves and exports without training."""

    per_device_train_batch_size: int = 1
    """Rows of a micro-batch."""

    per_device_eval_batch_size: int = 1
    """Rows of a micro-batch in evaluation."""

    gradient_accumulation_steps: int | None = None
    """Micro-batches a data-parallel rank adds up per step (default 1, or what global_batch_size needs)."""

    global_batch_size: int | None = None
    """Rows of a step over all data-parallel ranks; sets gradient_accumulation_steps."""


@dataclass(kw_only=True)
class OptimizerOptions:
    """AdamW and its schedule."""

    learning_rate: float | None = None
    """Peak learning rate (default 1e-5, with LoRA 1e-4)."""

    min_lr: float = 0.0
    """Learning rate at the end of a cosine or linear schedule."""

    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises linearly from zero."""

    warmup_steps: int | None = None
    """Steps in which the learning rate rises linearly from zero; overrides warmup_ratio."""

    warmup_type: Literal["linear", "log"] = "linear"
    """How it rises; log is DeepSpeed's default shape, log(step + 1) / log(warm-up steps)."""

    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the schedule after the warm-up."""

    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norms are left out."""

    adam_beta1: float = 0.9
    """First-moment decay."""

    adam_beta2: float = 0.95
    """Second-moment decay."""

    adam_epsilon: float = 1e-8
    """Term that keeps the update finite."""

    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""

    exp_avg_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of AdamW's first moments; bfloat16 saves 2 bytes a parameter (distributed optimizer)."""

    exp_avg_sq_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of AdamW's second moments; bfloat16 needs adam_beta2 of at most 0.99."""

    optimizer_cpu_offload: bool = False
    """Keep master weights and moments in host memory, and update them there (distributed optimizer)."""

    optimizer_offload_fraction: float = 1.0
    """Share of the parameters that optimizer_cpu_offload takes."""

    use_distributed_optimizer: bool = True
    """Shard optimizer states over the data-parallel ranks (ZeRO-1)."""

    data_parallel_sharding_strategy: (
        Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] | None
    ) = None
    """What data-parallel ranks shard: nothing (use_distributed_optimizer false), optimizer states (ZeRO-1,
    the default), gradients too (ZeRO-2), or weights too (ZeRO-3). The last two are Megatron-FSDP.
    """

    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass still runs (data-parallel size > 1)."""

    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward pass runs (distributed optimizer, data-parallel size >
    1).
    """

    @property
    def fully_sharded(self) -> bool:
        """Whether Megatron-FSDP is asked for."""
        return self.data_parallel_sharding_strategy in ("optim_grads", "optim_grads_params")


@dataclass(kw_only=True)
class ForeignOptions:
    """Settings of other trainers, which become options; `--dry_run` prints what becomes what."""

    deepspeed: str | None = None
    """zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, a JSON file of DeepSpeed, or JSON itself."""

    fsdp: list[str] | None = None
    """full_shard, shard_grad_op, no_shard, auto_wrap or fsdp2, or a JSON file with fsdp and fsdp_config."""

    fsdp_config: str | None = None
    """JSON file, or JSON, with settings of FSDP."""

    fsdp_transformer_layer_cls_to_wrap: list[str] = field(default_factory=list)
    """Layers that FSDP shards as one; here always the decoder layers."""


@dataclass(kw_only=True)
class RecomputeOptions:
    """Activation checkpointing."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; granularity full unless set."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers, or the core attention only."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers full recomputation takes (default uniform)."""

    recompute_num_layers: int | None = None
    """Layers of a recomputed group (uniform), or recomputed layers per stage (block); default 1."""

    recompute_modules: list[str] = field(default_factory=list)
    """What granularity selective recomputes in every layer: core_attn (the default), layernorm, mlp_act
    (silu(gate) * up of dense layers), mlp, moe, shared_experts.
    """


@dataclass(kw_only=True)
class ParallelOptions:
    """Degrees of parallelism; what is left of the world is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share the matrices of a layer."""

    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""

    context_parallel_size: int = 1
    """Ranks that share a sequence."""

    cp_comm_type: Literal["all_gather", "a2a", "p2p"] | None = None
    """How context-parallel ranks exchange: keys and values of all ranks (all_gather), tokens for heads (a2a,
    Ulysses), or in a ring (p2p, Transformer Engine only). Default: all_gather, with Transformer Engine p2p.
    """

    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer."""

    expert_tensor_parallel_size: int | None = None
    """Ranks that share the matrices of an expert (default 1)."""

    sequence_parallel: bool | None = None
    """Split norms and dropout over the tensor-parallel ranks; on whenever tensor_model_parallel_size > 1."""

    decoder_layers_per_stage: list[int] | None = None
    """Layers of every model chunk in pipeline order, where an even split is not wanted."""


@dataclass(kw_only=True)
class MoeOptions:
    """Models with a mixture of experts."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss; default: that of the model's configuration; 0 switches it off."""

    moe_z_loss_coeff: float = 0.0
    """Weight of the router's z-loss, which keeps its logits small."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: each is sent to the ranks of its experts, or all ranks see all."""

    moe_expert_capacity_factor: float | None = None
    """An expert takes at most this many times its even share of a rank's micro-batch, and the rest is
    dropped; default: no token is dropped.
    """

    moe_token_drop_policy: Literal["probs", "position"] | None = None
    """Which tokens an expert beyond its capacity drops: those with the smallest weights, or the last."""


@dataclass(kw_only=True)
class RunOptions:
    """What a run leaves behind and how it is watched."""

    output_dir: str | None = None
    """Directory for checkpoints, exports and logs; created, and must be empty unless the run is resumed."""

    seed: int = 42
    """Seed of the data order and of every random generator."""

    logging_steps: int = 1
    """Steps between log lines."""

    eval_steps: int | None = None
    """Steps between evaluations; default: at the end, where there are rows to evaluate."""

    save_steps: int | None = None
    """Steps between checkpoints; the last step is always saved."""

    save_total_limit: int | None = None
    """Checkpoints kept; older ones are removed."""

    resume_from_checkpoint: str | None = None
    """A checkpoint directory, or `auto` for the newest complete one in output_dir (a fresh start if there is
    none).
    """

    async_save: bool = True
    """Write checkpoints beside training: a step waits only while its tensors are copied."""

    force_resume: bool = False
    """Resume although the training data, their number or the seed are not those of the checkpoint."""

    export_steps: int | None = None
    """Steps between exports for transformers beside training, as `hf-<step>` or `adapter-<step>`; a multiple
    of save_steps.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    """Where loss or gradients are not finite: end the run and say where, or leave the update out and count
    it. Weights never take such an update.
    """

    loss_spike_factor: float | None = 3.0
    """Report a loss above this many times the median of the last 50 steps; `none`: never."""

    hang_timeout: float = 1800.0
    """Seconds without a finished step, evaluation or checkpoint after which the run ends, with the stacks of
    all ranks in output_dir/stacks; 0: never.
    """

    deterministic: bool = False
    """Deterministic kernels only; CPU runs are deterministic without it."""

    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, swanlab, mlflow (where installed), or
    none.
    """

    dry_run: bool = False
    """Print the resolved configuration, the rank grid, an estimate of memory and the steps, and stop."""


@dataclass(kw_only=True)
class LaunchOptions:
    """Processes and nodes; the environment variables of the same names in capitals do the same."""

    nproc_per_node: int | None = None
    """Processes on this node (default 1)."""

    nnodes: int | None = None
    """Nodes of the run."""

    node_rank: int | None = None
    """Index of this node."""

    master_addr: str | None = None
    """Address of node 0."""

    master_port: int | None = None
    """Free port on node 0."""

    max_restarts: int = 0
    """Times that the ranks are started again after one of them failed; they go on from the newest whole
    checkpoint.
    """


@dataclass(kw_only=True)
class SftConfig:
    """Everything `braid sft` is told, grouped by concern."""

    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataOptions = field(default_factory=DataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    foreign: ForeignOptions = field(default_factory=ForeignOptions)
    recompute: RecomputeOptions = field(default_factory=RecomputeOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    moe: MoeOptions = field(default_factory=MoeOptions)
    run: RunOptions = field(default_factory=RunOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)
