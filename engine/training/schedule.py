"""Learning rate by step, with the shapes of transformers' schedulers of the same names."""

import math
from dataclasses import dataclass

from engine.config.options import OptimizerOptions


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """`schedule(step)` for steps counted from 0. As in transformers, the first warm-up step has learning rate
    0.

    `constant` is transformers' `constant_with_warmup`; with a minimum, `cosine` is its `cosine_with_min_lr`.
    """

    peak: float
    minimum: float
    shape: str
    warmup_steps: int
    total_steps: int
    warmup_type: str = "linear"
    """log: DeepSpeed's, log(step + 1) / log(warmup_steps) of the peak."""

    @classmethod
    def from_options(cls, options: OptimizerOptions, total_steps: int) -> "LearningRate":
        """A share of the steps is rounded up, as transformers' TrainingArguments does."""
        warmup = options.warmup_steps
        return cls(
            peak=options.learning_rate or 0.0,
            minimum=options.min_lr,
            shape=options.lr_scheduler_type,
            warmup_steps=math.ceil(total_steps * options.warmup_ratio) if warmup is None else warmup,
            total_steps=total_steps,
            warmup_type=options.warmup_type,
        )

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            if self.warmup_type == "log":
                return self.peak * math.log(step + 1) / math.log(max(2, self.warmup_steps))
            return self.peak * step / max(1, self.warmup_steps)
        if self.shape == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1.0 - progress
        return self.minimum + (self.peak - self.minimum) * share
