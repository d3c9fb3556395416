"""A `braid` command that can be held up or made to fail at a chosen place. Run by the tests of continued
conversions and of crews.

    python -m tests.converters.convert_worker SETTINGS WORD...

SETTINGS is JSON, the fields of `Settings`; WORDs are those of the command. Names of files that this process
wrote are printed, one line each.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from converters import conversion, transfer
from converters.hf.reader import HfReader
from converters.mcore import layout
from converters.mcore.reader import McoreSource
from converters.transfer import RECORDS_DIR, FileRecord
from engine.errors import ModelError
from launch.cli import main


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is different from the command as users have it."""

    file_size: int | None = None
    """Bytes of tensor data in a file of a Megatron checkpoint, for more files than one of a tiny model."""
    output: str = ""
    slow_after: int | None = None
    """Once so many files of `output` are finished, reading slows down, in the middle of a file: "slow" is
    printed, and every further read takes `pause` seconds.
    """
    pause: float = 0.0
    fail: str | None = None
    """The source raises a ModelError of this message."""
    die: bool = False
    """The process is killed at its first read."""
    late: float = 0.0
    """Seconds that pass between planning and the staging directory."""


class _Reads:
    """Counts and delays reads, then does them."""

    def __init__(self, settings: Settings, read: Any) -> None:
        self._settings, self._read, self._after = settings, read, 0

    def __call__(self, source: Any, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        settings = self._settings
        if settings.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.fail is not None:
            raise ModelError(settings.fail)
        if (
            settings.slow_after is not None
            and len(finished(Path(str(settings.output)))) >= settings.slow_after
        ):
            self._after += 1
            if self._after == 3:
                print("slow", flush=True)
            if self._after >= 3:
                time.sleep(settings.pause)
        rows: Tensor = self._read(source, name, start, stop, out)
        return rows


def stages(output: Path) -> list[Path]:
    """The staging directories of an output directory."""
    return sorted(output.parent.glob(f".{output.name}.partial-*"))


def finished(output: Path) -> list[str]:
    """Names of the files that are finished in its staging directory."""
    records = (path for stage in stages(output) for path in (stage / RECORDS_DIR).glob("*.json"))
    return sorted(path.name.removesuffix(".json") for path in records)


@contextmanager
def changed(settings: Settings) -> Iterator[None]:
    """The settings hold within the block."""
    staged, keep, defaults = (
        conversion.staged_directory,
        transfer._Writer._keep,
        layout.plan_checkpoint.__kwdefaults__,
    )

    def late(*args: Any, **options: Any) -> Any:
        time.sleep(settings.late)
        return staged(*args, **options)

    def telling(writer: Any, record: FileRecord) -> None:
        keep(writer, record)
        print(writer._file.name, flush=True)

    with (
        mock.patch.object(HfReader, "read_rows", _method(_Reads(settings, HfReader.read_rows))),
        mock.patch.object(McoreSource, "read_rows", _method(_Reads(settings, McoreSource.read_rows))),
        mock.patch.object(transfer._Writer, "_keep", telling),
        mock.patch.object(conversion, "staged_directory", late),
        mock.patch.dict(defaults, {"file_size": settings.file_size or defaults["file_size"]}),
    ):
        yield


def _method(reads: _Reads) -> Any:
    return lambda *args, **options: reads(*args, **options)


if __name__ == "__main__":
    with changed(Settings(**json.loads(sys.argv[1]))):
        code = main(sys.argv[2:])
    sys.exit(code)
