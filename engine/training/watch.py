"""Watching a run: requests to stop, values that are not numbers, jumps of the loss, and standstill."""

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from engine.runtime.mcore import Groups

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Asked to end soon: by an administrator or a scheduler, and by Slurm's warning before the time limit."""

_WINDOW = 50
_LEAST = 10


class StopRequest:
    """Whether this process has received a signal of STOP_SIGNALS. The step under way is finished first; a
    second signal ends the process at once.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = signals
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals in the block. Elsewhere than on the main thread nothing can be handled."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._handle) for number in self._signals}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)


class LossWatch:
    """Notices a loss far above those of the last steps."""

    def __init__(self, factor: float | None) -> None:
        """A spike is a loss above `factor` times the median of the last 50; None: never."""
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def spike(self, loss: float) -> bool:
        """Take note of a step's loss; whether it is a spike. Spikes do not move the median."""
        known = len(self._recent) >= _LEAST
        if self._factor is not None and known and loss > self._factor * statistics.median(self._recent):
            return True
        if not math.isnan(loss):
            self._recent.append(loss)
        return False


def first_nonfinite(models: Sequence[DistributedDataParallel], groups: Groups) -> str:
    """Which rank holds which gradient that is not finite, the first of each rank. Call on every rank."""
    mine = next((name for name, gradient in _gradients(models) if not gradient.isfinite().all()), None)
    found: list[str | None] = [None] * groups.layout.world_size
    dist.all_gather_object(found, mine)
    bad = [f"rank {rank}: {name}" for rank, name in enumerate(found) if name is not None]
    return "; ".join(bad) if bad else "no single gradient, but their norm over all ranks"


def _gradients(models: Sequence[DistributedDataParallel]) -> Iterator[tuple[str, torch.Tensor]]:
    for index, model in enumerate(models):
        if model.ddp_config.use_megatron_fsdp:
            yield from ((rows.name, rows.gradient) for rows in model.rows.values() if rows.trained)
            continue
        for name, parameter in model.module.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                yield (f"chunk {index} {name}" if len(models) > 1 else name), gradient


class Watchdog:
    """Ends the process when nothing has happened for too long, after writing down where every thread stands.

    The ranks of a run wait for one another, so when one is stuck all of them are, and each writes its own
    stacks.
    """

    def __init__(self, timeout: float, stacks: Path, give_up: Callable[[str], None]) -> None:
        """`timeout` in seconds, 0 for never; `give_up(message)` ends the process."""
        self._timeout, self._stacks, self._give_up = timeout, stacks, give_up
        self._last, self._doing = time.monotonic(), "starting"
        self._closed = threading.Event()
        if timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Something has happened; `doing` is what comes next."""
        self._last, self._doing = time.monotonic(), doing

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            still = time.monotonic() - self._last
            if still < self._timeout:
                continue
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with open(self._stacks, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._give_up(
                f"no progress for {still:.0f} s while {self._doing} (hang_timeout {self._timeout:.0f}); "
                f"where every thread stood is in {self._stacks}"
            )
            return


def exit_at_once(message: str) -> None:
    """The last resort of a process that nobody else ends."""
    print(f"failed: {message}", file=sys.stderr, flush=True)
    os._exit(1)
