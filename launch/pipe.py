"""`| head` has had enough: a command whose reader has gone ends without a word, as other Unix tools do."""

import os
import select
import signal

CLOSED = 128 + signal.SIGPIPE
"""Exit code, as a shell has it of a program that the signal ended."""


def reader_has_gone(error: BaseException) -> bool:
    """Whether an error comes from output that nobody reads. Other pipes of a process can break too."""
    if isinstance(error, SystemExit):  # rich's, which has let go of stdout
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and bool(_abandoned())


def let_go() -> None:
    """What is still buffered must not fail at exit."""
    for stream in _abandoned():
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _abandoned() -> list[int]:
    """stdout and stderr, if their reader has gone."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return [stream for stream, events in poll.poll(0) if events & select.POLLERR]
