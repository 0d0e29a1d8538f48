"""Reading in the background."""

from __future__ import annotations

import time
from itertools import count

from vortex_core.utils.timeline import Timeline


def test_it_reads_while_it_lasts_and_once_at_each_end() -> None:
    with Timeline(count().__next__, interval=0.01) as timeline:
        while len(timeline.moments) < 3:
            time.sleep(0.01)
        assert timeline.running
    assert not timeline.running
    assert [moment.reading for moment in timeline.moments] == list(range(len(timeline.moments)))
    seconds = [moment.seconds for moment in timeline.moments]
    assert seconds == sorted(seconds)
    with Timeline(count().__next__, interval=60) as brief:
        pass
    assert len(brief.moments) == 2


def test_it_ends_by_itself_goes_on_when_told_and_keeps_the_latest() -> None:
    left = [True, True, False, True, False]
    timeline = Timeline(count().__next__, interval=0, kept=4, goes_on=lambda: left.pop(0))
    timeline.start()
    timeline.join(60)
    assert [moment.reading for moment in timeline.moments] == [0, 1, 2]
    timeline.start()
    timeline.join(60)
    assert [moment.reading for moment in timeline.moments] == [1, 2, 3, 4]


def test_a_reading_that_fails_is_left_out_and_a_host_that_does_not_tell_ends_it() -> None:
    left = iter([1, 0, 2])
    going = iter([True, True])

    def read() -> float:
        return 1 / next(left)

    timeline = Timeline(read, interval=0.001, goes_on=lambda: next(going))
    timeline.start()
    timeline.join(10)
    assert not timeline.running
    assert [moment.reading for moment in timeline.moments] == [1, 0.5]
