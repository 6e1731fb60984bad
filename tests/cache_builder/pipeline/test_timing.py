"""Where a build's time goes."""

import pytest

from cache_builder.pipeline.timing import StageSeconds, Stopwatch


def test_the_bottleneck_is_what_is_waited_for_most() -> None:
    assert StageSeconds().bottleneck() == ""
    assert StageSeconds(teacher=8, encode=1, wait_device=8, wait_decode=2).bottleneck() == "teacher 80%"
    assert StageSeconds(teacher=1, encode=3, wait_device=8, wait_decode=2).bottleneck() == "encoding 80%"
    assert StageSeconds(teacher=9, wait_decode=3, wait_device=1).bottleneck() == "waiting for images 75%"
    assert StageSeconds(wait_write=1).bottleneck() == "waiting for the disk 100%"


def test_a_stopwatch_adds_up_even_when_the_block_fails() -> None:
    seconds = StageSeconds(teacher=1.0)
    with Stopwatch(seconds, "teacher"):
        pass
    with pytest.raises(ValueError, match="x"), Stopwatch(seconds, "teacher"):
        raise ValueError("x")
    assert 1.0 < seconds.teacher < 1.5
    assert seconds.decode == 0
