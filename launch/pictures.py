"""`make pictures`: what a run looks like, for the README: `docs/terminal.svg` and `docs/loss.png`.

A tiny model is trained in a pseudo terminal; the picture is that terminal's screen, not a drawing of it.
"""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from itertools import groupby
from pathlib import Path

import pyte
from pyte.screens import Char
from rich.console import Console
from rich.style import Style
from rich.text import Text

from launch.tiny import build_tiny_qwen3

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COLUMNS, ROWS = 114, 26
SNAPSHOT_STEP = 60
OUTPUT = "qwen3-tiny-sft"
# Relative names only: the picture must not show where it was made.
COMMAND = rf"""braid sft --config configs/qwen3_tiny_cpu.yaml --model qwen3-tiny --output_dir {OUTPUT} \
    --dataset configs/data/qa.jsonl --split_dataset_ratio 0.1 \
    --max_steps 85 --eval_steps 17 --logging_steps 1"""


def main() -> int:
    """Train in a temporary folder and write both pictures. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="braid-") as name:
        folder = Path(name)
        (folder / "configs").symlink_to(ROOT / "configs")
        build_tiny_qwen3(folder / "qwen3-tiny")
        code, screen = run_on_screen(COMMAND, folder)
        if code != 0:
            print(f"{screen.plain}\npictures failed: the run ended with {code}", file=sys.stderr)
            return code
        console = Console(record=True, width=COLUMNS, file=StringIO())
        console.print(screen)
        console.save_svg(str(DOCS / "terminal.svg"), title="braid sft", unique_id="braid")
        shutil.copy(folder / OUTPUT / "loss.png", DOCS / "loss.png")
    print("wrote docs/terminal.svg and docs/loss.png")
    return 0


def run_on_screen(command: str, folder: Path) -> tuple[int, Text]:
    """Run it in a terminal of its own; its exit code, and the screen at SNAPSHOT_STEP or when it failed."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
    words = shlex.split(command.replace("\\\n", ""))[1:]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=folder,
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    screen, snapshot = pyte.Screen(COLUMNS, ROWS), None
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {command}\n".replace("\n", "\r\n").encode())
    try:
        while data := os.read(ours, 65536):
            stream.feed(data)
            if snapshot is None and _step(screen) >= SNAPSHOT_STEP:
                snapshot = as_text(screen)
    except OSError:
        pass  # EIO: nobody writes any more
    os.close(ours)
    code = process.wait()
    return code, as_text(screen) if code != 0 or snapshot is None else snapshot


def _step(screen: pyte.Screen) -> int:
    """What the bar on the screen says; 0 if there is none or it is half drawn."""
    found = re.findall(r"^step +(\d+)/\d+ .* eta [\d:]+ *$", "\n".join(screen.display), re.MULTILINE)
    return int(found[-1]) if found else 0


def as_text(screen: pyte.Screen) -> Text:
    """The screen with its colours, without the empty lines at its end."""
    text = Text(no_wrap=True)
    for row in range(ROWS):
        cells = [screen.buffer[row][column] for column in range(COLUMNS)]
        for style, run in groupby(cells, key=_style):
            text.append("".join(cell.data for cell in run), style)
        text.append("\n")
    text.rstrip()
    return text


def _style(cell: Char) -> Style:
    return Style(color=_color(cell.fg), bold=cell.bold, italic=cell.italics, underline=cell.underscore)


def _color(name: str) -> str:
    """A colour of pyte as rich names it."""
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


if __name__ == "__main__":
    sys.exit(main())
