"""How many rows make a step: micro-batch x accumulation x data-parallel ranks. Pure Python."""

from dataclasses import dataclass

from engine.config.options import BatchOptions
from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """global_batch_size == micro_batch_size * accumulation * data_parallel_size."""

    micro_batch_size: int
    accumulation: int
    global_batch_size: int


def resolve_batch_shape(
    options: BatchOptions, *, data_parallel_size: int, resumed_global_batch_size: int | None = None
) -> BatchShape:
    """Derive the missing one of accumulation and global batch. Raises ConfigError where they contradict.

    A resumed run keeps the global batch it was started with, whatever the new layout: the accumulation
    follows.
    """
    micro = options.per_device_train_batch_size
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(options, name)}")
    accumulation, wanted = options.gradient_accumulation_steps, options.global_batch_size
    if accumulation is not None and accumulation < 1:
        raise ConfigError(f"gradient_accumulation_steps must be at least 1, not {accumulation}")
    if resumed_global_batch_size is not None:
        if wanted is not None and wanted != resumed_global_batch_size:
            raise ConfigError(
                f"global_batch_size {wanted} differs from the resumed run's {resumed_global_batch_size}; "
                f"leave it out"
            )
        wanted, accumulation = resumed_global_batch_size, None
    per_pass = micro * data_parallel_size
    if wanted is None:
        accumulation = accumulation or 1
        return BatchShape(
            micro_batch_size=micro, accumulation=accumulation, global_batch_size=per_pass * accumulation
        )
    if wanted < 1 or wanted % per_pass:
        raise ConfigError(
            f"global_batch_size {wanted} is not a multiple of per_device_train_batch_size {micro} x "
            f"{data_parallel_size} data-parallel ranks = {per_pass}"
        )
    if accumulation is not None and per_pass * accumulation != wanted:
        raise ConfigError(
            f"global_batch_size {wanted} contradicts {micro} x {accumulation} x {data_parallel_size} = "
            f"{per_pass * accumulation} rows (micro-batch x gradient_accumulation_steps x data-parallel "
            f"ranks)"
        )
    return BatchShape(micro_batch_size=micro, accumulation=wanted // per_pass, global_batch_size=wanted)
