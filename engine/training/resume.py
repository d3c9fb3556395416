"""Which checkpoints a run has, and where each of them stands. Needs neither torch nor Megatron.

A checkpoint is a directory `checkpoint-<step>` that is complete or absent (see engine.training.checkpoint).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands; stored as JSON in its checkpoints."""

    step: int
    """Optimizer steps done."""

    total_steps: int
    global_batch_size: int
    num_rows: int
    data_fingerprint: str
    seed: int
    tokens: int
    """Tokens seen."""

    layout: dict[str, int]
    """Degrees under which the checkpoint was written."""

    stream: dict[str, int] | None = None
    """Where a stream of rows stands (engine.data.stream.StreamPosition); None of rows that are not streamed.
    """

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainerState":
        """Raises CheckpointError if `checkpoint` is not a complete training checkpoint."""
        if not is_complete(checkpoint):
            raise CheckpointError(
                f"{checkpoint} is not a complete training checkpoint; pass another or `auto`"
            )
        try:
            values = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{checkpoint / STATE_FILE} cannot be read ({error})") from error

    def check_same_run(self, other: "TrainerState", checkpoint: Path) -> None:
        """Raise CheckpointError if `other`, the run that wants to go on from here, has other data or another
        seed.
        """
        for name, what in (
            ("seed", "seed"),
            ("num_rows", "number of sequences"),
            ("data_fingerprint", "training data"),
        ):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise CheckpointError(
                    f"{checkpoint} belongs to a run with another {what} ({mine}, now {its}); resume with "
                    f"the data set, template, max_length, packing and seed of that run"
                )


def is_complete(checkpoint: Path) -> bool:
    """Whether a directory holds all parts that only a finished save leaves."""
    return all((checkpoint / name).is_file() for name in (STATE_FILE, ".metadata", "metadata.json"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def resolve_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to continue from: a path, the newest complete one for `auto`, or None for a fresh
    start.
    """
    if resume is None:
        return None
    if resume == "auto":
        complete = list_checkpoints(output_dir)
        return complete[-1] if complete else None
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint {resume} is not a directory; pass a checkpoint-<step> or auto"
        )
    return path
