"""What rank 0 shows: plain lines in a file, a bar on a terminal."""

import sys
from io import StringIO
from typing import Any

import pyte
import pytest
from rich.console import Console

from engine.training.display import Display

LINE = "step  3/10  loss 1.2346  lr 1.00e-03  grad norm 0.500  12,346 tok/s  eta 1:02:03"


def a_record(**changes: Any) -> dict[str, Any]:
    record = {
        "step": 3,
        "loss": 1.23456,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 900,
        "tokens_per_s": 12345.6,
        "tflops_per_gpu": 0.1,
        "mfu": None,
        "mem_gib": None,
        "elapsed_s": 9.0,
        "eta_s": 3723.4,
    }
    return record | changes


def a_file() -> Console:
    # Said outright: FORCE_COLOR in the environment would make a terminal of it.
    return Console(file=StringIO(), force_terminal=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(file=StringIO(), force_terminal=True, width=120)


def rows(terminal: Console) -> list[str]:
    """The lines that stand on the screen once everything written so far has arrived."""
    screen = pyte.Screen(120, 20)
    screen.set_mode(pyte.modes.LNM)  # as a terminal's driver does: a line feed also returns
    assert isinstance(terminal.file, StringIO)
    pyte.Stream(screen).feed(terminal.file.getvalue())
    return [row.rstrip() for row in screen.display if row.strip()]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, LINE),
        ({"mfu": 0.4234}, LINE.replace("  eta", "  MFU 42.3 %  eta")),
        ({"grad_norm": None}, LINE.replace("norm 0.500", "norm -")),
        ({"eta_s": None}, LINE.removesuffix("  eta 1:02:03")),
        ({"eta_s": float("inf")}, LINE.removesuffix("  eta 1:02:03")),
        ({"eta_s": 90000.0}, LINE.replace("eta 1:02:03", "eta 1 day, 1:00:00")),
        ({"step": 10, "eta_s": 0.0}, LINE.replace(" 3/", "10/").replace("1:02:03", "0:00:00")),
        ({"loss": float("nan")}, LINE.replace("1.2346", "nan")),
    ],
)
def test_a_record_is_one_line_in_a_file(
    changes: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(10, 0, enabled=True, console=a_file())
    display.advance(3)
    display.record(a_record(**changes))
    display.close()
    assert capsys.readouterr().out == line + "\n"


def test_events_stand_between_the_records_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(10, 0, enabled=True, console=a_file())
    display.record(a_record())
    display.line("step 3  eval loss 1.5 [bold]")
    display.record(a_record())
    display.close()
    assert capsys.readouterr().out == f"{LINE}\nstep 3  eval loss 1.5 [bold]\n{LINE}\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_ranks_show_nothing(is_terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=StringIO(), force_terminal=is_terminal)
    display = Display(10, 0, enabled=False, console=console)
    display.advance(3)
    display.record(a_record())
    display.line("an event")
    display.close()
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_a_bar_stays_below_what_happens_on_a_terminal(
    terminal: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.stdout
    display = Display(10, 0, enabled=True, console=terminal)
    for step in (1, 2):
        display.advance(step)
        display.record(a_record(step=step, loss=9.0))
    display.line("step 2  eval loss 1.5 [bold]")  # no markup of rich
    print("a word from elsewhere")
    display.advance(3)
    display.record(a_record(mfu=0.4234))
    display.close()
    assert sys.stdout is before
    first, second, bar = rows(terminal)
    assert (first, second) == ("step 2  eval loss 1.5 [bold]", "a word from elsewhere")
    assert bar.startswith("step  3/10 ")
    assert "━" in bar
    assert bar.endswith(" loss 1.2346  lr 1.00e-03  grad norm 0.500  12,346 tok/s  MFU 42.3 %  eta 1:02:03")
    assert capsys.readouterr().out == ""


def test_the_bar_counts_steps_that_are_not_logged(terminal: Console) -> None:
    display = Display(10, 0, enabled=True, console=terminal)
    display.record(a_record())
    display.advance(7)
    display.close()
    (bar,) = rows(terminal)
    assert bar.startswith("step  7/10 ")
    assert "loss 1.2346" in bar


def test_the_bar_of_a_resumed_run_starts_where_it_left_off(terminal: Console) -> None:
    Display(10, 6, enabled=True, console=terminal).close()
    (bar,) = rows(terminal)
    assert bar.startswith("step  6/10 ")


def test_a_narrow_terminal_keeps_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=StringIO(), force_terminal=True, width=80)
    display = Display(1200, 0, enabled=True, console=console)
    display.advance(80)
    display.record(a_record(mfu=0.4))
    display.close()
    assert any("80/1200" in row and "loss 1.2346" in row for row in rows(console))


def test_a_terminal_that_cannot_redraw_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    display = Display(10, 0, enabled=True, console=Console(file=StringIO(), force_terminal=True))
    display.record(a_record())
    assert capsys.readouterr().out == LINE + "\n"
