"""The GPUs of this machine, looked at without opening one."""

import os
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec

from engine.config.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU of this machine."""

    name: str
    gib: float


def visible_card(options: ModelOptions) -> Card | None:
    """The smallest card that the run would see here, as the driver's own tool says it: asking CUDA would open
    the card. None without one, and for runs on the CPU.
    """
    if options.device == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    return min(_cards(), key=lambda card: card.gib, default=None)


def count_visible() -> int:
    """GPUs that a process on this machine can use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(_cards()) if named is None else len([name for name in named.split(",") if name])


def _cards() -> list[Card]:
    command = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ", 1) for line in done.stdout.splitlines() if line[:1].isdigit()]
    return [Card(name=name, gib=float(mib) / 1024) for mib, name in lines]


def may_have_te(options: ModelOptions, *, dry_run: bool) -> bool:
    """Whether layers can be Transformer Engine's here. A dry run away from GPUs is for another machine, of
    which nothing is known.
    """
    if options.device == "cpu" or options.transformer_impl == "torch":
        return False
    return find_spec("transformer_engine") is not None or (dry_run and visible_card(options) is None)
