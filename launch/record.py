"""What a run writes down about itself: configuration, versions, revision."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "braid",
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "transformer-engine",
    "flash-attn-4",
    "apex",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide about results; None where one is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_revision() -> str | None:
    """Revision of the source tree that runs, with "+" if it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def options_text(options: Mapping[str, Any]) -> str:
    """Options as YAML, as `--config` reads them."""
    import yaml

    return str(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))


def write_args(path: Path, options: Mapping[str, Any]) -> None:
    """Write the resolved options so that `--config` reads them back, and the rest as comments."""
    import yaml

    facts = {"command": shlex.join(sys.argv), "git_revision": git_revision(), "versions": versions()}
    comment = "".join(f"# {line}\n" for line in yaml.safe_dump(facts, sort_keys=False).splitlines())
    path.write_text(comment + options_text(options), encoding="utf-8")
