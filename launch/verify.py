"""`braid verify`: flags, and the verdict that it prints."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.parse import help_text, parse
from engine.errors import ConfigError, OutputError


@dataclass(kw_only=True)
class VerifyOptions:
    """Flags of `braid verify`."""

    model: str | None = None
    """Hugging Face directory that is right by definition."""

    checkpoint: str | None = None
    """What is compared with it: a Megatron checkpoint or a Hugging Face directory."""

    report: str | None = None
    """File for a JSON report."""


def verify(argv: Sequence[str]) -> int:
    """The command `braid verify`: 0 if both hold the same model, 1 if not. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        print("usage: braid verify --model DIR --checkpoint DIR\n" + help_text(VerifyOptions))
        return 0
    options, _ = parse(VerifyOptions, argv)
    if options.model is None or options.checkpoint is None:
        raise ConfigError("verify compares --model DIR with --checkpoint DIR; pass both")
    from rich.console import Console

    from converters.verify import verify as compare

    report = compare(options.model, options.checkpoint)
    if report.same:
        print(report.summary())
    else:
        Console(width=max(100, Console().width)).print(report.table())
    if options.report is not None:
        _write_report(Path(options.report), report.as_dict())
    return 0 if report.same else 1


def _write_report(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"--report {path} cannot be written: {error.strerror}") from None
