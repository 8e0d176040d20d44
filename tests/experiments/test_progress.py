"""Progress: percentages and time left from what was done, lines not too often."""

import io

import pytest

from experiments import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_counts_all_that_is_planned_and_not_what_was_done_before(clock):
    stream = io.StringIO()
    shown = progress.Progress(stream, interval=0.0)
    shown.plan(400)
    shown.start("a", 200, done=100)  # from a checkpoint: took no time now
    clock[0] += 10.0
    shown.advance(50, "task 2/2")
    # 50 units took 10 s; 400 - 150 = 250 are left.
    assert stream.getvalue().splitlines()[-1] == " 37 %  a: task 2/2, 50 s left"


def test_lines_come_at_intervals_and_the_last_one_always(clock):
    stream = io.StringIO()
    shown = progress.Progress(stream, interval=10.0)
    shown.start("a", 10)
    for _ in range(10):
        clock[0] += 2.5
        shown.advance(1)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "40", "80", "100"]


def test_terminal_keeps_one_line_and_warnings_stay(clock):
    stream = Terminal()
    shown = progress.Progress(stream)
    shown.start("a", 10)
    shown.warn("careful")
    assert stream.getvalue() == "\r\x1b[K  0 %  a: starts\r\x1b[Kwarning: careful\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (75, "1 min 15 s"), (4000, "1 h 06 min")],
)
def test_seconds_read_well(seconds, text):
    assert progress.format_seconds(seconds) == text
