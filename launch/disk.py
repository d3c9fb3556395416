"""Room on the disk: whether a run can finish on it, and one clear line where it fills up all the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import OutputError, UserError
from engine.storage.durable import is_full

# Of an fp32 master weight and two moments of AdamW, beside the weight itself.
_OPTIMIZER_BYTES = 12


def nearest(path: Path) -> Path:
    """The path itself, or where it would be made: the nearest of its parents that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_room(output_dir: Path, *, num_parameters: int, weight_bytes: int) -> None:
    """Raise OutputError unless one checkpoint and one export fit: the least that every run writes."""
    from engine.storage.files import check_free_space

    needed = num_parameters * (2 * weight_bytes + _OPTIMIZER_BYTES)
    what = "a checkpoint of this model with its export"
    check_free_space(nearest(output_dir), needed, what=what, remedy=" or choose another output_dir")


@contextmanager
def full_disk_named(output_dir: Path) -> Iterator[None]:
    """Turn what a full disk does to any writer into an OutputError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not _is_full(error):
            raise
        raise OutputError(
            f"disk full while writing {output_dir}; make room or lower save_total_limit, "
            f"then go on with --resume_from_checkpoint auto"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        # torch's zip writer does not hand on the reason: it says that the file is shorter than what it wrote.
        short = "inline_container.cc" in text and "unexpected pos" in text
        if (isinstance(error, OSError) and is_full(error)) or "No space left" in text or short:
            return True
        error = error.__cause__ or error.__context__
    return False
