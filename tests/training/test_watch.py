"""Signals, spikes and standstill, each without a run around it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.training.watch import LossWatch, StopRequest, Watchdog


def test_a_signal_is_a_request() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    request = StopRequest((signal.SIGUSR1,))
    with request.listening():
        assert request.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.received is signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_signal_ends_the_process() -> None:
    script = """
import os, signal
from engine.training.watch import StopRequest
with StopRequest().listening():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=root, capture_output=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert b"still here" not in done.stdout


def test_a_spike_is_far_above_the_median_and_does_not_move_it() -> None:
    watch = LossWatch(3.0)
    assert not any(watch.spike(100.0 if step == 3 else 2.0) for step in range(10)), "too few to tell"
    assert [watch.spike(loss) for loss in (5.9, 6.1, 50.0, 2.0, float("nan"))] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert not any(LossWatch(None).spike(10.0**step) for step in range(60))


def test_the_watchdog_writes_stacks_and_gives_up(tmp_path: Path) -> None:
    told: list[str] = []
    done = threading.Event()

    def give_up(message: str) -> None:
        told.append(message)
        done.set()

    watchdog = Watchdog(0.3, tmp_path / "stacks" / "rank-0.txt", give_up)
    watchdog.beat("in step 7")
    assert done.wait(60)
    assert "while in step 7" in told[0]
    stacks = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "test_the_watchdog_writes_stacks_and_gives_up" in stacks


def test_beats_keep_the_watchdog_quiet(tmp_path: Path) -> None:
    told: list[str] = []
    watchdog = Watchdog(5.0, tmp_path / "stacks", told.append)
    for step in range(20):
        watchdog.beat(f"in step {step}")
        time.sleep(0.01)
    watchdog.close()
    off = Watchdog(0.0, tmp_path / "stacks", told.append)
    assert not [thread for thread in threading.enumerate() if thread is getattr(off, "thread", None)]
    assert not told
