"""Opening a rank for a benchmark: device, process groups, and what they run on."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from engine.config.parallel import ParallelLayout
from launch.processes import World
from launch.record import git_revision, versions
from launch.sft import join_ranks, leave_ranks

if TYPE_CHECKING:
    from engine.runtime.mcore import Groups
    from engine.runtime.platform import Platform


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a result must be read with."""

    command: str
    date: str
    """UTC, ISO 8601."""

    revision: str | None
    """Git revision of the source, with "+" if it was changed; None outside a checkout."""

    versions: dict[str, str | None]
    """By package; None where one is absent."""

    cuda: str | None
    """CUDA version of torch; None in a CPU build."""

    device: str
    """Name of the card, or cpu."""

    backend: str

    @classmethod
    def here(cls, platform: "Platform") -> "Environment":
        """Of this process."""
        import torch

        device = "cpu" if platform.is_cpu else torch.cuda.get_device_name()
        return cls(
            command=command_line(sys.argv[1:]),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            revision=git_revision(),
            versions=versions(),
            cuda=torch.version.cuda,
            device=device,
            backend=platform.backend,
        )


def command_line(words: Sequence[str]) -> str:
    """A braid command as it was typed, with the variables that start processes."""
    set_here = [f"{name}={os.environ[name]}" for name in ("NPROC_PER_NODE", "NNODES") if os.environ.get(name)]
    return " ".join([*set_here, shlex.join(["braid", *words])])


@contextlib.contextmanager
def opened_groups(
    layout: ParallelLayout, platform: "Platform", world: World, place: list[str], *, seed: int,
    deterministic: bool = False,
) -> Iterator["Groups"]:  # fmt: skip
    """Megatron's groups for `layout` over all ranks, closed at the end. `place` receives the rank's grid
    coordinates, for error messages.
    """
    from engine.runtime import mcore

    mcore.adapt_megatron(platform)
    join_ranks(world, platform)
    place.append(str(layout.place(world.rank)))
    yield mcore.initialize(layout, platform, seed=seed, deterministic=deterministic)
    # After a failure other ranks may be stuck in a collective: then the process just ends.
    leave_ranks()
