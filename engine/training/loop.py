"""The training loop: step, log, evaluate, save; and what it does when it starts from a checkpoint."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from engine.config.options import SftConfig
from engine.config.parse import flatten
from engine.data.loader import Loader
from engine.data.stream import StreamLoader
from engine.errors import StoppedError, TrainingError
from engine.runtime.mcore import Groups
from engine.runtime.platform import Platform
from engine.training.checkpoint import CheckpointSaver, layout_degrees, load_checkpoint
from engine.training.display import Display
from engine.training.metrics import MetricsLog, Throughput, take_expert_load
from engine.training.optimizer import set_learning_rate
from engine.training.resume import TrainerState
from engine.training.schedule import LearningRate
from engine.training.startup import Startup
from engine.training.step import StepResult, StepTotals, evaluate, global_totals, train_step
from engine.training.watch import LossWatch, StopRequest, Watchdog, exit_at_once, first_nonfinite


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

    startup: Startup | None = None
    """Times the start; its line is shown after the first step."""

    give_up: Callable[[str], None] = exit_at_once
    """Ends this process with a message when the run stands still."""

    stop: StopRequest = field(default_factory=StopRequest)
    """Upon which the run is saved and ends; whoever trains lets it listen."""

    export: Callable[[Path], None] | None = None
    """Turns a checkpoint into what transformers or PEFT load, on a thread of rank 0."""

    def fit(self, resume: Path | None) -> Path:
        """Train to the last step, from `resume` if given; returns the last checkpoint.

        Raises StoppedError when the run was asked to stop, after saving; TrainingError when values are not
        finite; OutputError when a checkpoint cannot be written.
        """
        run, plan = self.config.run, self.train_data.plan
        state = self._state_at(step=0, tokens=0)
        if resume is not None:
            stored = TrainerState.read(resume)
            if not run.force_resume:
                stored.check_same_run(state, resume)
            load_checkpoint(resume, stored, self.models, self.optimizer, self.groups)
            state = stored
            if self.startup is not None:
                self.startup.mark("checkpoint")
        first = self.groups.rank == 0
        with contextlib.ExitStack() as stack:
            tools = _Tools(
                log=MetricsLog(
                    self.output_dir,
                    report_to=run.report_to,
                    options=flatten(self.config),
                    resumed_step=state.step,
                    enabled=first,
                ),
                display=Display(plan.total_steps, state.step, enabled=first),
                saver=CheckpointSaver(
                    self.output_dir,
                    self.groups,
                    add_companions=self.add_companions,
                    keep=run.save_total_limit,
                    background=run.async_save,
                    export=self.export,
                    export_steps=run.export_steps,
                ),
                watchdog=Watchdog(
                    run.hang_timeout,
                    self.output_dir / "stacks" / f"rank-{self.groups.rank}.txt",
                    self.give_up,
                ),
                losses=LossWatch(run.loss_spike_factor),
                stop=self.stop,
            )
            for tool in (tools.log, tools.display, tools.saver, tools.watchdog):
                stack.callback(tool.close)
            last = self._run(state, resume, tools)
            tools.watchdog.beat("writing the last checkpoint")
            tools.saver.wait()
            tools.saver.wait_for_exports()
        for model in self.models:
            if model.ddp_config.use_megatron_fsdp:  # gathers ahead for a step that will not come
                model.stop_communication()
        return last

    def _run(self, state: TrainerState, resume: Path | None, tools: "_Tools") -> Path:
        run, plan = self.config.run, self.train_data.plan
        speed = Throughput(self.platform, self.groups.layout.world_size, self.started)
        tokens, last, waited = state.tokens, resume, 0.0
        tools.watchdog.beat(f"in step {state.step + 1}")
        for batch in self.train_data.steps(state.step, state.stream):
            step = batch.step + 1
            learning_rate = self.schedule(batch.step)
            set_learning_rate(self.optimizer, learning_rate, self.config.optimizer.weight_decay)
            result = train_step(
                self.models, self.optimizer, batch.micro_batches, self.groups, self.platform.device
            )
            totals = global_totals(
                result.losses,
                result.micro_batches,
                self.flops_per_token,
                self.groups,
                self.platform.device,
                stop=tools.stop.received is not None,
            )
            self._inspect(step, totals, result, tools)
            tokens += totals.tokens
            waited += batch.wait_s
            speed.add(totals)
            tools.display.advance(step)
            if self.startup is not None and step == state.step + 1:
                self.startup.mark("step")
                tools.display.line(self.startup.line())
            if step % run.logging_steps == 0 or step in (1, plan.total_steps):
                experts = self._experts(totals)
                record = {
                    "step": step,
                    "loss": totals.loss,
                    "lr": learning_rate,
                    "grad_norm": result.grad_norm,
                    "tokens": tokens,
                    **speed.take(steps_left=plan.total_steps - step),
                    "data_wait_s": round(waited, 4),
                    "skipped_steps": tools.skipped,
                    **experts,
                }
                waited = 0.0
                tools.log.write(record)
                tools.display.record(record)
            paused = time.monotonic()
            if self._due(step, run.eval_steps):
                tools.watchdog.beat(f"evaluating after step {step}")
                self._evaluate(step, tools)
            ended = step == plan.total_steps
            if ended or totals.stop or (run.save_steps and step % run.save_steps == 0):
                tools.watchdog.beat(f"saving step {step}")
                last = self._save(tools.saver, step, tokens, batch.position)
            tools.saver.poll()
            if totals.stop and not ended:
                self._stop(step, tools.saver)
            speed.pause(time.monotonic() - paused)
            tools.watchdog.beat(f"in step {step + 1}")
        # A run of no steps is saved as it started, so that it can be exported.
        return last or self._save(tools.saver, 0, tokens, None)

    def _experts(self, totals: StepTotals) -> dict[str, Any]:
        """What is logged of a mixture of experts."""
        load = take_expert_load(self.models)
        return {"aux_loss": totals.aux_loss, "z_loss": totals.z_loss, **load} if load else {}

    def _inspect(self, step: int, totals: StepTotals, result: StepResult, tools: "_Tools") -> None:
        """Say what is strange about a step; the same on every rank. Raises TrainingError if it must not go
        on.
        """
        norm = result.grad_norm
        if result.grad_norm is None and not result.updated:
            tools.skipped += 1
            tools.display.line(f"step {step}: gradients overflowed float16, the update is left out")
        elif not (math.isfinite(totals.loss) or not totals.supervised) or not math.isfinite(norm or 0.0):
            tools.skipped += 1
            where = first_nonfinite(self.models, self.groups)
            message = f"step {step}: loss {totals.loss}, gradient norm {norm}; not finite: {where}"
            if self.config.run.nonfinite == "stop":
                raise TrainingError(
                    f"{message}. The update was left out; lower learning_rate, look at this step's data, "
                    f"or pass --nonfinite skip"
                )
            tools.display.line(f"{message}; the update is left out ({tools.skipped} so far)")
        elif tools.losses.spike(totals.loss):
            tools.display.line(f"step {step}: loss {totals.loss:.4f} is a spike")

    def _stop(self, step: int, saver: CheckpointSaver) -> None:
        """End here, when what was saved is complete on every rank."""
        saver.wait()
        dist.barrier()
        raise StoppedError(
            f"stopped after step {step} as asked, and saved checkpoint-{step}; go on with "
            f"--resume_from_checkpoint auto"
        )

    def _due(self, step: int, every: int | None) -> bool:
        if self.eval_data is None:
            return False
        return step == self.train_data.plan.total_steps or bool(every and step % every == 0)

    def _evaluate(self, step: int, tools: "_Tools") -> None:
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
        tools.log.write(record)
        tools.display.line(f"step {step}  eval loss {totals.loss:.4f}")

    def _save(self, saver: CheckpointSaver, step: int, tokens: int, stream: dict[str, int] | None) -> Path:
        state = self._state_at(step=step, tokens=tokens, stream=stream)
        with parameters_gathered(self.models):
            return saver.save(state, self.models, self.optimizer)

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
            layout=layout_degrees(self.models, self.groups),
            stream=stream,
        )


@dataclass(kw_only=True)
class _Tools:
    """What accompanies the steps of a run."""

    log: MetricsLog
    display: Display
    saver: CheckpointSaver
    watchdog: Watchdog
    losses: LossWatch
    stop: StopRequest
    skipped: int = 0
    """Steps whose update was left out, since the run was started or resumed."""


@contextlib.contextmanager
def parameters_gathered(models: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """With parameter gathering overlapped, an update reaches the model only in the next forward pass: gather
    it now. Megatron-FSDP gathers in any forward pass.
    """
    overlapped = [
        model
        for model in models
        if model.ddp_config.overlap_param_gather and not model.ddp_config.use_megatron_fsdp
    ]
    for model in overlapped:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for model in overlapped:
            model.enable_forward_pre_hook()
