"""The training loop: step, log, evaluate, save; and what it does when it starts from a checkpoint."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from engine.config.options import SftConfig
from engine.config.parse import flatten
from engine.data.loader import Loader
from engine.data.stream import StreamLoader
from engine.runtime.mcore import Groups
from engine.runtime.platform import Platform
from engine.training.checkpoint import layout_degrees, load_checkpoint, save_checkpoint
from engine.training.display import Display
from engine.training.metrics import MetricsLog, Throughput
from engine.training.optimizer import set_learning_rate
from engine.training.resume import TrainerState
from engine.training.schedule import LearningRate
from engine.training.step import evaluate, global_totals, train_step


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A run, ready to go. Every rank holds one; `fit` is called on all of them."""

    config: SftConfig
    flops_per_token: Callable[[int], float]
    """FLOPs of a token in a document of that many tokens."""

    platform: Platform
    groups: Groups
    models: Sequence[DistributedDataParallel]
    optimizer: Any
    schedule: LearningRate
    train_data: Loader | StreamLoader
    eval_data: Loader | None
    output_dir: Path
    add_companions: Callable[[Path], Any]
    """Adds to a checkpoint directory what its export to Hugging Face needs (rank 0)."""

    started: float
    """time.monotonic() at the start of the program."""

    def fit(self, resume: Path | None) -> Path:
        """Train to the last step, from `resume` if given; returns the last checkpoint."""
        run, plan = self.config.run, self.train_data.plan
        state = self._state_at(step=0, tokens=0)
        if resume is not None:
            TrainerState.read(resume).check_same_run(state, resume)
            state = load_checkpoint(resume, self.models, self.optimizer, self.groups)
        log = MetricsLog(
            self.output_dir,
            report_to=run.report_to,
            options=flatten(self.config),
            resumed_step=state.step,
            enabled=self.groups.rank == 0,
        )
        display = Display(plan.total_steps, state.step, enabled=self.groups.rank == 0)
        try:
            last = self._run(state, resume, log, display)
        finally:
            display.close()
            log.close()
        return last

    def _run(self, state: TrainerState, resume: Path | None, log: MetricsLog, display: Display) -> Path:
        run, plan = self.config.run, self.train_data.plan
        speed = Throughput(self.platform, self.groups.layout.world_size, self.started)
        tokens, last, waited = state.tokens, resume, 0.0
        for batch in self.train_data.steps(state.step, state.stream):
            step = batch.step + 1
            learning_rate = self.schedule(batch.step)
            set_learning_rate(self.optimizer, learning_rate, self.config.optimizer.weight_decay)
            result = train_step(
                self.models, self.optimizer, batch.micro_batches, self.groups, self.platform.device
            )
            totals = global_totals(
                result.losses, result.micro_batches, self.flops_per_token, self.groups, self.platform.device
            )
            tokens += totals.tokens
            waited += batch.wait_s
            speed.add(totals)
            display.advance(step)
            if not result.updated:
                display.line(f"step {step}: gradients overflowed float16, the update is left out")
            if step % run.logging_steps == 0 or step in (1, plan.total_steps):
                record = {
                    "step": step,
                    "loss": totals.loss,
                    "lr": learning_rate,
                    "grad_norm": result.grad_norm,
                    "tokens": tokens,
                    **speed.take(steps_left=plan.total_steps - step),
                    "data_wait_s": round(waited, 4),
                }
                waited = 0.0
                log.write(record)
                display.record(record)
            paused = time.monotonic()
            if self._due(step, run.eval_steps):
                self._evaluate(step, log, display)
            if step == plan.total_steps or (run.save_steps and step % run.save_steps == 0):
                last = self._save(step, tokens, batch.position)
            speed.pause(time.monotonic() - paused)
        # A run of no steps is saved as it started, so that it can be exported.
        return last or self._save(0, tokens, None)

    def _due(self, step: int, every: int | None) -> bool:
        if self.eval_data is None:
            return False
        return step == self.train_data.plan.total_steps or bool(every and step % every == 0)

    def _evaluate(self, step: int, log: MetricsLog, display: Display) -> None:
        assert self.eval_data is not None
        with parameters_gathered(self.models):
            batches = (batch.micro_batches for batch in self.eval_data.steps())
            totals = evaluate(self.models, batches, self.flops_per_token, self.groups, self.platform.device)
        record = {
            "step": step,
            "eval_loss": totals.loss,
            "eval_perplexity": math.exp(min(totals.loss, 700.0)),
            "eval_tokens": totals.tokens,
        }
        log.write(record)
        display.line(f"step {step}  eval loss {totals.loss:.4f}")

    def _save(self, step: int, tokens: int, stream: dict[str, int] | None) -> Path:
        state = self._state_at(step=step, tokens=tokens, stream=stream)
        with parameters_gathered(self.models):
            return save_checkpoint(
                self.output_dir,
                state,
                self.models,
                self.optimizer,
                self.groups,
                add_companions=self.add_companions,
                keep=self.config.run.save_total_limit,
            )

    def _state_at(self, *, step: int, tokens: int, stream: dict[str, int] | None = None) -> TrainerState:
        plan = self.train_data.plan
        return TrainerState(
            step=step,
            total_steps=plan.total_steps,
            global_batch_size=plan.global_batch_size,
            num_rows=plan.num_rows,
            data_fingerprint=self.train_data.fingerprint,
            seed=self.config.run.seed,
            tokens=tokens,
            layout=layout_degrees(self.groups),
            stream=stream,
        )


@contextlib.contextmanager
def parameters_gathered(models: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """With parameter gathering overlapped, an update reaches the model only in the next forward pass: gather
    it now.
    """
    overlapped = [model for model in models if model.ddp_config.overlap_param_gather]
    for model in overlapped:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for model in overlapped:
            model.enable_forward_pre_hook()
