"""What tests of hostile directories share: a place that is watched, and ways to do harm."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.launch.runs import everything_in

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
NOT_PLAIN = "is not a plain file name"
Edit = Callable[[Path], Any]
"""Does harm to a directory."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A test's directory, and what its commands print."""

    root: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    def refused(self, words: list[str], *named: str) -> None:
        """The command ends with exit code 2 and one line that holds `named`, and nothing has changed."""
        before = everything_in(self.root)
        self.capsys.readouterr()  # what making the model printed
        code = main([*words, "--output_dir", str(self.out)])
        printed = self.capsys.readouterr()
        assert code == 2, printed
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        assert printed.err.startswith("braid convert: error: ")
        assert all(part in printed.err for part in named), printed.err
        assert everything_in(self.root) == before

    def converts(self, words: list[str]) -> Path:
        """The command succeeds, and nothing has changed but that `out` is there."""
        before = everything_in(self.root)
        self.capsys.readouterr()
        assert main([*words, "--output_dir", str(self.out)]) == 0
        assert self.capsys.readouterr().err == ""
        after = everything_in(self.root)
        assert {name: after[name] for name in after if Path(name).parts[0] != "out"} == before
        return self.out


def watched(root: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    """A place with a directory `elsewhere`, for what harm is done with."""
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "secret.safetensors").write_bytes(b"secret")
    return Place(root=root, capsys=capsys)


def to_mcore(model: Path) -> list[str]:
    return ["convert", "--to", "mcore", "--model", str(model)]


def to_hf(checkpoint: Path) -> list[str]:
    return ["convert", "--to", "hf", "--checkpoint", str(checkpoint)]


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a safetensors file, or of a header that is kept alone."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    replace_header(path, json.dumps(header).encode())


def replace_header(path: Path, text: bytes) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    """A file of any size, which takes no room on the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(start)
    os.truncate(path, size)


def link_out(path: Path) -> None:
    """The same content, by a link to a directory beside that of the file."""
    target = path.parent.parent / "elsewhere" / "moved"
    target.parent.mkdir(exist_ok=True)
    shutil.move(path, target)
    path.symlink_to(target)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (exec, (f"open({str(self.target)!r}, 'w')",))
