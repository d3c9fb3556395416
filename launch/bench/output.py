"""What every benchmark leaves: a table on the terminal, and a JSON, a Markdown and a PNG file."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.ranks import Environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self) -> None:
        """Print it with rich."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console = Console()
        Console(width=max(_WIDTH, console.width) if console.is_terminal else _WIDTH).print(table)

    def markdown(self) -> str:
        """The same as a Markdown table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def write_files(directory: Path, stem: str, record: dict[str, Any], markdown: str, figure: "Figure") -> None:
    """Write STEM.json, STEM.md and STEM.png into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / f"{stem}.png")
    (directory / f"{stem}.md").write_text(markdown + "\n", encoding="utf-8")
    write_json(directory / f"{stem}.json", record)
    print(f"wrote {stem}.json, {stem}.md and {stem}.png to {directory}", flush=True)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write an object as `write_whole` does, into a directory that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or absent, whoever else writes it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def provenance(environment: Environment) -> str:
    """Markdown that says where numbers come from."""
    known = [f"{name} {number}" for name, number in environment.versions.items() if number]
    cuda = [f"CUDA {environment.cuda}"] if environment.cuda else []
    return "\n".join(
        [
            "```",
            environment.command,
            "```",
            "",
            f"{environment.date} on {environment.device} over {environment.backend}; "
            f"git revision {environment.revision or 'unknown'}; {', '.join(known + cuda)}.",
        ]
    )
