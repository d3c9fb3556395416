"""How long a start takes, and what with. Needs neither torch nor Megatron."""

import time


class Startup:
    """Parts of the time from the start of a command, or of a restarted rank, to the end of its first step."""

    def __init__(self, began: float) -> None:
        """`began` is the time.monotonic() from which it counts."""
        self._began = self._last = began
        self._parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """What was done since the last mark."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def line(self) -> str:
        """For the terminal."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts.items())
        return f"first step {self._last - self._began:.1f} s after the start: {parts}"
