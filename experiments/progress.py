"""Progress on stderr: how far, and how much longer."""

import sys
import time
from typing import TextIO


class Progress:
    """Tells how far a run is; on a terminal in one line, else now and then a line.

    Args:
      stream: where to write; None says nothing.
      interval: seconds between two lines if the stream is no terminal.
    """

    def __init__(self, stream: TextIO | None = sys.stderr, interval: float = 10.0):
        """See the class."""
        self._stream = stream
        self._terminal = bool(stream and stream.isatty())
        self._interval = 0.2 if self._terminal else interval
        self._total = 0
        self._done = 0
        self._ran = 0
        self._planned = 0
        self._name = ""
        self._began = time.monotonic()
        self._shown = 0.0

    def plan(self, work: int) -> None:
        """Announces the lane-steps of all programs, for an honest time left."""
        self._planned = work

    def start(self, name: str, work: int, done: int = 0) -> None:
        """A program begins; ``done`` of its ``work`` lane-steps were done before."""
        self._name = name
        self._total += work
        self._done += done
        if self._ran == 0:
            self._began = time.monotonic()
        self._show("done before" if done == work else "starts", force=True)

    def advance(self, work: int, note: str = "") -> None:
        """``work`` more lane-steps are done."""
        self._ran += work
        self._done += work
        self._show(note, force=self._done >= max(self._total, self._planned))

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        if self._stream:
            start = "\r\x1b[K" if self._terminal else ""
            print(f"{start}{text}", file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Writes a warning."""
        self.say(f"warning: {text}")

    def _show(self, note: str, force: bool) -> None:
        now = time.monotonic()
        if not self._stream or (not force and now - self._shown < self._interval):
            return
        self._shown = now
        total = max(self._total, self._planned, 1)
        left = ""
        if self._ran and self._done < total:
            seconds = (now - self._began) * (total - self._done) / self._ran
            left = f", {format_seconds(seconds)} left"
        text = f"{100 * self._done // total:3d} %  {self._name}: {note}{left}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """``75`` -> ``"1 min 15 s"``.

    Example:
      >>> format_seconds(75.2), format_seconds(4000)
      ('1 min 15 s', '1 h 06 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
