"""The files that travel beside weights: configuration, tokenizer, chat template, licence."""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from engine.errors import UserError
from engine.storage.durable import fsync
from engine.storage.files import inside

COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""What travels beside the weights. Never weights, their index, Python files or pickles."""


def companion_names(source_dir: Path) -> list[str]:
    """Names of the files in `source_dir` that belong beside the weights, sorted."""
    names = sorted(entry.name for entry in source_dir.iterdir())
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS)]


def copy_companions(
    source_dir: str | Path, target_dir: str | Path, *, error: type[UserError] = UserError
) -> list[str]:
    """Copy configuration, tokenizer, chat template and licence byte by byte; returns the names copied.

    Raises `error` for a file that is a link out of `source_dir`.
    """
    source, target = Path(source_dir), Path(target_dir)
    names = companion_names(source)
    for name in names:
        shutil.copyfile(inside(source, name, error=error), target / name)
        fsync(target / name)
    return names
