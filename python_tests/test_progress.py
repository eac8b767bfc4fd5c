"""Progress in a log: the first and the last of a stage, and between them a line now and then."""

import io

import pytest

from mxq_ext import progress
from mxq_ext.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """clock.now, which only the test moves."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def lines(items, clock, seconds, **options):
    out = io.StringIO()
    for _ in Progress(stream=out).track(items, "stage", **options):
        clock.now += seconds
    return out.getvalue().splitlines()


def test_a_long_stage_is_told_every_few_seconds(clock):
    told = lines(range(511), clock, 0.25)
    assert told == [f"stage: {i}/511 ({i / 4:.1f} s)" for i in (*range(1, 511, 20), 511)]


def test_slow_steps_are_told_one_by_one_and_fast_ones_by_their_ends(clock):
    assert lines(range(3), clock, 60) == [f"stage: {i}/3 ({60 * i}.0 s)" for i in (1, 2, 3)]
    assert lines(range(100), clock, 0) == ["stage: 1/100 (0.0 s)", "stage: 100/100 (0.0 s)"]
    assert lines(range(1), clock, 0) == ["stage: 1/1 (0.0 s)"] and lines([], clock, 0) == []


def test_stages_of_unknown_length_end_with_their_last_step(clock):
    assert lines(iter(range(9)), clock, 0.5) == ["stage: 1/? (0.5 s)", "stage: 9/? (4.5 s)"]
    assert lines(range(5), clock, 0.5, total=9) == ["stage: 1/9 (0.5 s)", "stage: 5/9 (2.5 s)"]


def test_quiet_says_nothing(clock):
    out = io.StringIO()
    assert list(Progress(quiet=True, stream=out).track([1, 2], "stage")) == [1, 2] and out.getvalue() == ""
