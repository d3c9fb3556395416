"""Which checkpoints a run has, and where each of them stands. Needs neither torch nor Megatron.

A checkpoint is a directory `checkpoint-<step>` that is complete or absent (see engine.training.checkpoint).
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from engine.storage.manifest import STATE_FILE, check_manifest, read_manifest

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
        if (wrong := damage(checkpoint)) is not None:
            raise CheckpointError(f"{wrong}; resume from another checkpoint or pass `auto`")
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
    """Whether a directory holds all files of a finished save; the shards' content is not looked at."""
    return damage(checkpoint) is None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint at first sight, as one line; None if its manifest, the sizes of all
    files, and the content of those that are read before the ranks share the hashing of the shards are right.
    """
    try:
        problems = check_manifest(checkpoint, read_manifest(checkpoint), hashed=_is_no_shard)
    except CheckpointError as error:
        return str(error)
    if problems:
        return f"{checkpoint / problems[0].name}: {problems[0].line()}"
    if not (checkpoint / STATE_FILE).is_file():
        return f"{checkpoint} has no {STATE_FILE}; it is no checkpoint of a run"
    return None


def _is_no_shard(name: str) -> bool:
    return not name.endswith(".distcp")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def passed_over(output_dir: Path, chosen: Path | None) -> list[str]:
    """What is wrong with each directory of a checkpoint that is newer than `chosen`, as one line each."""
    found = {int(m[1]): path for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))}
    match = _NAME.fullmatch(chosen.name) if chosen is not None else None
    newest = int(match[1]) if match else -1
    return [line for step in sorted(found) if step > newest and (line := damage(found[step])) is not None]


def resolve_resume(
    resume: str | None, output_dir: Path, *, damaged: Collection[Path] = (), restarted: bool = False
) -> Path | None:
    """The checkpoint to continue from: a path, the newest complete one for `auto`, or None for a fresh start.

    `damaged` are passed over. A run that was `restarted` goes on from its own newest checkpoint, whatever it
    began from.
    """
    complete = [path for path in list_checkpoints(output_dir) if path not in damaged]
    if complete and (resume == "auto" or restarted):
        return complete[-1]
    if resume == "auto":
        if broken := [*passed_over(output_dir, None), *map(str, damaged)]:
            raise CheckpointError(
                f"{broken[-1]}; no checkpoint of {output_dir} is whole, remove them to start afresh"
            )
        return None
    if resume is None:
        return None
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint {resume} is not a directory; pass a checkpoint-<step> or auto"
        )
    return path
