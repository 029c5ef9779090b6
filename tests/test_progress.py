"""Progress: how often a log gets a line, and what is in it."""

import sys

import pytest

from vla_spec.clock import NS_PER_S, VirtualClock
from vla_spec.progress import LiveProgress, PlainProgress


class Log:
    """Lines of one phase whose parts take ``part_s`` each."""

    def __init__(self):
        self.lines, self.clock = [], VirtualClock()
        self.progress = PlainProgress(self.lines.append, self.clock.now_ns)

    def play(self, total, part_s, done=None, text=""):
        self.progress.phase("closed loop", total)
        for _ in range(total if done is None else done):
            self.clock.advance(round(part_s * NS_PER_S))
            self.progress.step(text)
        return self.lines


def test_a_phase_begins_with_a_line():
    assert Log().play(120, 1.0, done=0) == ["closed loop: 0 of 120"]


def test_a_line_says_how_far_how_long_how_much_longer_and_what():
    lines = Log().play(20, 2.0, text="drawer-open seed 3 exact: success")
    assert lines[1] == "closed loop: 2 of 20, 4 s, about 36 s left: drawer-open seed 3 exact: success"
    assert lines[-1] == "closed loop: 20 of 20, 40 s: drawer-open seed 3 exact: success"
    assert len(lines) == 1 + 10


def test_quick_parts_give_a_line_per_tenth():
    lines = Log().play(200, 0.1)
    assert lines[1:3] == [
        "closed loop: 20 of 200, 2 s, about 18 s left",
        "closed loop: 40 of 200, 4 s, about 16 s left",
    ]
    assert len(lines) == 1 + 10


def test_a_phase_that_is_over_at_once_takes_two_lines():
    assert Log().play(1000, 0.0005) == ["closed loop: 0 of 1000", "closed loop: 1000 of 1000, 0 s"]


def test_slow_parts_give_a_line_each():
    assert len(Log().play(30, 11.0)) == 1 + 30


def test_a_long_phase_is_never_silent_for_much_longer_than_ten_seconds():
    lines = Log().play(1000, 3.0, done=50)
    assert [line.split(",")[0] for line in lines[:4]] == [
        "closed loop: 0 of 1000", "closed loop: 4 of 1000", "closed loop: 8 of 1000", "closed loop: 12 of 1000",
    ]  # fmt: skip


def test_phases_count_for_themselves():
    log = Log()
    log.play(3, 2.0)
    lines = log.play(3, 2.0)
    assert lines[:4] == lines[4:]


def test_a_phase_of_nothing():
    assert Log().play(0, 1.0) == ["closed loop: 0 of 0"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_pipe_gets_lines_and_a_terminal_gets_bars(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with LiveProgress() as progress:
        progress.phase("closed loop", 2)
        progress.step("one")
        progress.step("two")
    out, err = capsys.readouterr()
    assert out == ""
    plain = "closed loop: 0 of 2\nclosed loop: 2 of 2, 0 s: two\n"
    assert (err == plain) is not is_terminal
    assert "closed loop" in err
    assert ("\x1b[" in err) is is_terminal
