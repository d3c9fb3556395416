"""A run on paper: all options checked against each other, the model and the files, before any rank starts."""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.config.adoption import Adoption
from engine.config.batch import BatchShape, resolve_batch_shape
from engine.config.device import check_layers
from engine.config.options import BatchOptions, LoraOptions, MoeOptions, SftConfig
from engine.config.parallel import ParallelLayout
from engine.config.parse import flatten
from engine.config.recompute import MLP_ACTIVATION, check_recompute
from engine.errors import CheckpointError, ConfigError, OutputError
from engine.model.lora_spec import LoraSpec, lora_from_options, read_lora_config
from engine.model.spec import ModelSpec, load_model_spec
from launch.disk import check_room, nearest
from launch.gpu import may_have_te
from launch.models import locate
from launch.processes import World, command_began, restart_count

REPORTERS = ("tensorboard", "wandb", "swanlab", "mlflow", "none")
HELD_OUT = 0.01
"""Share of the rows to evaluate on, where evaluation is asked for and nothing is said of rows."""

LEARNING_RATES = {"full": 1e-5, "lora": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A run whose settings fit each other and the model."""

    config: SftConfig
    spec: ModelSpec
    layout: ParallelLayout
    shape: BatchShape
    model_dir: Path
    output_dir: Path
    resume: Path | None
    lora: LoraSpec | None
    """The adapter that is trained; None in full training."""

    started: float
    """time.monotonic() at the start of the command."""

    adopted: Adoption | None = None
    """What came as settings of another trainer."""

    @property
    def micro_batch_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this: the layout cuts them, and fp8 products
        take multiples of 16.
        """
        layout = self.layout
        fp8 = 16 * layout.tp * layout.cp if self.config.model.fp8_recipe is not None else 1
        return math.lcm(layout.micro_batch_multiple, fp8)

    def summary(self) -> str:
        """The model and how ranks are laid out."""
        spec = self.spec
        adapter = [] if self.lora is None else [self.lora.summary(spec)]
        adopted = [] if self.adopted is None else [self.adopted.table()]
        return "\n".join(
            [
                *adopted,
                f"model: {self.model_dir} ({spec.summary()})",
                *adapter,
                f"layout: {self.layout.summary()}",
                self.layout.grid(),
            ]
        )


def draw(
    config: SftConfig, world: World, *, damaged: Collection[Path] = (), adopted: Adoption | None = None
) -> Blueprint:
    """Check all settings against each other and the model; `damaged` are checkpoints not to resume from,
    `adopted` is what `adopt` took over. Raises UserError; imports neither torch nor Megatron.
    """
    from engine.data.prepare import check_options
    from engine.training.resume import TrainerState, resolve_resume

    run, options = config.run, config.model
    if options.model is None:
        raise ConfigError("no model given; pass --model DIR")
    if run.output_dir is None:
        raise ConfigError("no output directory given; pass --output_dir DIR")
    _refuse_unbuilt(config)
    if config.data.split_dataset_ratio is None:
        evaluates = run.eval_steps and not config.data.val_dataset and not config.data.streaming
        config.data.split_dataset_ratio = HELD_OUT if evaluates else 0.0
    check_ranges(config)
    check_options(config.data)
    if config.data.streaming and config.batch.max_steps is None:
        raise ConfigError("streaming needs max_steps: how many rows will come is not known")
    model_dir = locate(options.model, use_hf=config.data.use_hf, world=world)
    spec = load_model_spec(model_dir)
    layout = lay_out(config, spec, world.size)
    if adopted is not None:
        _check_adopted_batch(config.batch, adopted, layout.dp)
    output_dir = Path(run.output_dir)
    resume = resolve_resume(
        run.resume_from_checkpoint, output_dir, damaged=damaged, restarted=restart_count() > 0
    )
    shape = resolve_batch_shape(
        config.batch,
        data_parallel_size=layout.dp,
        resumed_global_batch_size=TrainerState.read(resume).global_batch_size if resume else None,
    )
    layout.check_micro_batches(shape.accumulation)
    lora = draw_lora(config, spec, layout)
    if config.optimizer.learning_rate is None:
        config.optimizer.learning_rate = LEARNING_RATES[options.train_type]
    return Blueprint(
        config=config,
        spec=spec,
        layout=layout,
        shape=shape,
        model_dir=Path(model_dir),
        output_dir=output_dir,
        resume=resume,
        lora=lora,
        started=command_began(),
        adopted=adopted,
    )


def _check_adopted_batch(options: BatchOptions, adopted: Adoption, ranks: int) -> None:
    """Raise ConfigError in DeepSpeed's words where its three numbers do not agree."""
    request, accumulation = adopted.requests.get("global_batch_size"), options.gradient_accumulation_steps
    if request is None:
        return
    micro = options.per_device_train_batch_size
    rows = micro * ranks * (accumulation or 1)
    if request.value != rows if accumulation else request.value % rows:
        times = f" x gradient_accumulation_steps {accumulation}" if accumulation else ""
        raise ConfigError(
            f"{adopted.source}: {request.by} is not {'' if accumulation else 'a multiple of '}"
            f"train_micro_batch_size_per_gpu {micro}{times} x {ranks} data-parallel ranks = {rows}"
        )


def lay_out(config: SftConfig, spec: ModelSpec, world_size: int) -> ParallelLayout:
    """The layout that the options ask for, fitting the model and the number of processes. Raises
    ConfigError.
    """
    options = config.model
    layout = ParallelLayout.resolve(config.parallel, num_layers=spec.num_layers, world_size=world_size)
    spec.check_tensor_parallel(layout.tp)
    spec.check_expert_parallel(layout.ep, layout.etp)
    _check_experts(config, spec)
    spec.check_context_parallel(layout.tp, layout.cp, layout.cp_comm_type)
    layout.check_cp_comm_type(has_te=options.transformer_impl != "torch" and options.device != "cpu")
    if config.optimizer.fully_sharded:
        _check_full_sharding(config, layout)
    return layout


def _check_full_sharding(config: SftConfig, layout: ParallelLayout) -> None:
    """Raise ConfigError for what was not seen to train the same weights under Megatron-FSDP."""
    strategy = config.optimizer.data_parallel_sharding_strategy
    name = "ZeRO-2" if strategy == "optim_grads" else "ZeRO-3, FSDP"
    for option, value in (
        ("pipeline_model_parallel_size", layout.pp),
        ("expert_model_parallel_size", layout.ep),
        ("expert_tensor_parallel_size", layout.etp),
    ):
        if value > 1:
            raise ConfigError(
                f"{option} {value} does not go with data_parallel_sharding_strategy {strategy} ({name}); "
                f"leave it at 1, or take optim (--deepspeed zero1)"
            )
    if config.model.fp8_recipe is not None:
        raise ConfigError(
            f"fp8_recipe does not go with data_parallel_sharding_strategy {strategy} ({name}); leave it out, "
            f"or take optim (--deepspeed zero1)"
        )


def draw_lora(config: SftConfig, spec: ModelSpec, layout: ParallelLayout) -> LoraSpec | None:
    """The adapter that the options ask for, fitting the model and the layout. Raises ConfigError, or
    ModelError for what is wrong with `adapter`.
    """
    options, default = config.lora, LoraOptions()
    changed = [name for name in vars(default) if getattr(options, name) != getattr(default, name)]
    if config.model.train_type == "full":
        if changed:
            raise ConfigError(f"{changed[0]} goes with --train_type lora, not with full")
        return None
    if config.lora.lora_dropout == default.lora_dropout and _would_drop(options, spec):
        config.lora.lora_dropout = 0.0
    lora = lora_from_options(options)
    if options.adapter is not None:
        lora = _lora_of(options.adapter, lora, changed)
    lora.check(spec)
    if lora.lora_dropout and MLP_ACTIVATION in config.recompute.recompute_modules:
        raise ConfigError(
            f"recompute_modules '{MLP_ACTIVATION}' does nothing with lora_dropout {lora.lora_dropout:g}: "
            f"every adapter keeps an input of its own; leave it out, or set lora_dropout to 0"
        )
    targets = [place for place, _ in lora.targets(spec)]
    if layout.etp > 1 and any(place.experts for place in targets):
        raise ConfigError(
            "LoRA in routed experts is not proven with expert_tensor_parallel_size above 1; leave it at 1, "
            "or name target_modules without experts, such as q_proj k_proj v_proj o_proj"
        )
    with_adapter = {place.layer for place in targets}
    for rank in range(layout.pp):
        for layers in layout.chunks_of(rank):
            if not with_adapter & set(layers):
                raise ConfigError(
                    f"pipeline stage {rank} would have nothing to train: layers {layers.start}-"
                    f"{layers.stop - 1} have no adapter; choose other target_modules or fewer stages"
                )
    return lora


def _would_drop(options: LoraOptions, spec: ModelSpec) -> bool:
    """Whether the default dropout would hinder adapters of experts and their like, which know none."""
    return options.adapter is None and lora_from_options(options).adapts_parameters(spec)


def _lora_of(adapter: str, asked: LoraSpec, changed: Sequence[str]) -> LoraSpec:
    """What an adapter directory says of itself. Flags beside it, those in `changed`, must say the same."""
    if not Path(adapter).is_dir():
        raise ConfigError(f"adapter {adapter} is not a directory; pass one that PEFT saved")
    found = read_lora_config(Path(adapter))
    if found.modules_to_save:
        raise ConfigError(
            f"adapter {adapter} has modules_to_save {', '.join(found.modules_to_save)}: training whole "
            f"modules beside LoRA is not available in this version; start from an adapter without, or from "
            f"what braid merge makes of it"
        )
    for name in changed:
        field = {"lora_rank": "r"}.get(name, name)
        if field in vars(found) and getattr(found, field) != getattr(asked, field):
            raise ConfigError(
                f"{name} {getattr(asked, field)} contradicts {getattr(found, field)} of adapter {adapter}; "
                f"leave it out"
            )
    return found


def _refuse_unbuilt(config: SftConfig) -> None:
    for name in config.run.report_to:
        if name not in REPORTERS:
            raise ConfigError(f"report_to {name!r} is not known; choose from {', '.join(REPORTERS)}")
        if name not in ("tensorboard", "none") and find_spec(name) is None:
            raise ConfigError(f"report_to {name}: it is not installed; pip install {name}, or leave it out")
    if "none" in config.run.report_to and len(config.run.report_to) > 1:
        raise ConfigError("report_to none stands alone, not beside other names")


def check_ranges(config: SftConfig) -> None:
    """Raise ConfigError for a number that is out of range, or options that contradict each other, whatever
    the model is.
    """
    values = flatten(config)
    if values["max_steps"] is not None and values["max_steps"] < 0:
        raise ConfigError(f"max_steps must not be negative, not {values['max_steps']}")
    for name in ("logging_steps", "save_steps", "eval_steps", "save_total_limit", "export_steps"):
        if values[name] is not None and values[name] < 1:
            raise ConfigError(f"{name} must be at least 1, not {values[name]}")
    every, saves = values["export_steps"], values["save_steps"]
    if every is not None and (saves is None or every % saves):
        raise ConfigError(f"export_steps {every} must be a multiple of save_steps, not {saves}")
    if values["loss_spike_factor"] is not None and values["loss_spike_factor"] <= 1:
        raise ConfigError(f"loss_spike_factor must be above 1, not {values['loss_spike_factor']}")
    for name in ("learning_rate", "min_lr", "warmup_steps", "weight_decay", "max_grad_norm", "hang_timeout"):
        if values[name] is not None and values[name] < 0:
            raise ConfigError(f"{name} must not be negative, not {values[name]}")
    for name in ("num_train_epochs", "adam_epsilon"):
        if values[name] <= 0:
            raise ConfigError(f"{name} must be positive, not {values[name]}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= values[name] < 1:
            raise ConfigError(f"{name} must be in [0, 1), not {values[name]}")
    _check_stored_moments(config)
    options = config.model
    has_te, lora = may_have_te(options, dry_run=config.run.dry_run), options.train_type == "lora"
    check_layers(
        transformer_impl=options.transformer_impl,
        fp8_recipe=options.fp8_recipe,
        on_cuda=options.device != "cpu",
        te_installed=has_te,
    )
    check_recompute(config.recompute, has_te=has_te, fp8_recipe=options.fp8_recipe, lora=lora)
    if not 0 <= values["warmup_ratio"] <= 1:
        raise ConfigError(f"warmup_ratio must be in [0, 1], not {values['warmup_ratio']}")
    if not 0 <= values["seed"] < 2**32:
        raise ConfigError(f"seed must be in [0, 2**32), not {values['seed']}")


def _check_stored_moments(config: SftConfig) -> None:
    options = config.optimizer
    if "bfloat16" in (options.exp_avg_dtype, options.exp_avg_sq_dtype) and not (
        options.use_distributed_optimizer
    ):
        raise ConfigError(
            "exp_avg_dtype and exp_avg_sq_dtype bfloat16 need use_distributed_optimizer; leave it on"
        )
    # Rounded to 8 bits, a second moment that should shrink by less than 1/256 a step stays where it is.
    if options.exp_avg_sq_dtype == "bfloat16" and options.adam_beta2 > 0.99:
        raise ConfigError(
            f"exp_avg_sq_dtype bfloat16 with adam_beta2 {options.adam_beta2} would never forget a gradient; "
            f"take adam_beta2 of at most 0.99, or float32"
        )
    if not options.optimizer_cpu_offload:
        return
    if not options.use_distributed_optimizer:
        raise ConfigError("optimizer_cpu_offload needs use_distributed_optimizer; leave it on")
    if not 0 < options.optimizer_offload_fraction <= 1:
        fraction = options.optimizer_offload_fraction
        raise ConfigError(f"optimizer_offload_fraction must be above 0 and at most 1, not {fraction}")
    if "bfloat16" in (options.exp_avg_dtype, options.exp_avg_sq_dtype):
        raise ConfigError(
            "exp_avg_dtype and exp_avg_sq_dtype are float32 with optimizer_cpu_offload; leave them out"
        )


def _check_experts(config: SftConfig, spec: ModelSpec) -> None:
    options, default = config.moe, MoeOptions()
    changed = [name for name in vars(default) if getattr(options, name) != getattr(default, name)]
    if spec.moe is None:
        if changed:
            raise ConfigError(f"{changed[0]}: {spec.architecture} has no experts; leave it out")
        return
    for name in ("router_aux_loss_coef", "moe_z_loss_coeff"):
        if (getattr(options, name) or 0.0) < 0:
            raise ConfigError(f"{name} must not be negative, not {getattr(options, name)}")
    factor, policy = options.moe_expert_capacity_factor, options.moe_token_drop_policy
    if factor is not None and factor <= 0:
        raise ConfigError(f"moe_expert_capacity_factor must be positive, not {factor}")
    if factor is not None and policy is None:
        raise ConfigError(
            f"moe_expert_capacity_factor {factor} drops tokens; say which by moe_token_drop_policy, or leave "
            f"it out"
        )
    if policy is not None and factor is None:
        raise ConfigError("moe_token_drop_policy needs moe_expert_capacity_factor")


def check_files(blueprint: Blueprint) -> None:
    """Check what lies on disk before any rank starts or anything is written. Of weights only the headers are
    read.
    """
    check_output_dir(blueprint)
    options, spec, lora = blueprint.config.model, blueprint.spec, blueprint.lora
    in_fp32 = options.torch_dtype == "float32" or (options.torch_dtype is None and options.device != "cuda")
    check_room(
        blueprint.output_dir,
        num_parameters=spec.num_parameters() if lora is None else lora.num_parameters(spec),
        weight_bytes=4 if in_fp32 or lora is not None else 2,
    )
    if blueprint.resume is not None:
        _check_checkpoint(blueprint.resume, spec, lora)
    if blueprint.resume is None or lora is not None:
        from converters.hf.reader import HfReader, check_weights
        from converters.mapping import weight_map

        check_weights(HfReader(blueprint.model_dir), weight_map(spec))
    if blueprint.config.lora.adapter is not None:
        from converters.adapter import open_adapter

        open_adapter(blueprint.config.lora.adapter, spec)


def _check_checkpoint(checkpoint: Path, spec: ModelSpec, lora: LoraSpec | None) -> None:
    """Raise CheckpointError if it is of another model or adapter, or a file is missing or cut off."""
    from converters.adapter import check_adapter_checkpoint, holds_adapter
    from converters.mapping import weight_map
    from converters.mcore.reader import DistReader, check_checkpoint
    from engine.storage.reader import check_files

    reader = DistReader(checkpoint)
    if lora is not None:
        check_adapter_checkpoint(reader, spec, lora)
    elif holds_adapter(checkpoint):
        raise CheckpointError(f"{checkpoint} is of LoRA training; resume it with --train_type lora")
    else:
        check_checkpoint(reader, weight_map(spec))
    check_files(reader)


def check_output_dir(blueprint: Blueprint) -> None:
    """Raise OutputError if another run's files would be mixed with this one's, or nothing can be written."""
    directory = blueprint.output_dir
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"output_dir {directory} is a file; choose a directory")
    # `auto` starts afresh in a directory of a run that left no checkpoint, but not among foreign files.
    auto = blueprint.config.run.resume_from_checkpoint is not None and (directory / "args.yaml").is_file()
    if blueprint.resume is None and not auto and directory.is_dir() and any(directory.iterdir()):
        raise OutputError(
            f"output_dir {directory} is in use; choose another, empty it, or pass --resume_from_checkpoint "
            f"auto"
        )
    check_writable(directory)


def check_writable(directory: Path) -> None:
    """Raise OutputError if `directory` cannot be made, or nothing can be written there."""
    parent = nearest(directory)
    if not parent.is_dir():
        raise OutputError(f"output_dir {directory} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output_dir {directory} cannot be written: no permission in {parent}")
