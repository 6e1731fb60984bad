"""Where a build's time goes."""

import pytest

from cache_builder.stages import StageSeconds, Stopwatch


def test_the_bottleneck_is_the_stage_with_the_most_time() -> None:
    assert StageSeconds().bottleneck() == ""
    assert StageSeconds(decode=1, teacher=8, write=1).bottleneck() == "teacher 80%"
    assert StageSeconds(decode=3, teacher=1).bottleneck() == "waiting for images 75%"
    assert StageSeconds(write=1).bottleneck() == "waiting for the disk 100%"


def test_a_stopwatch_adds_up_even_when_the_block_fails() -> None:
    seconds = StageSeconds(teacher=1.0)
    with Stopwatch(seconds, "teacher"):
        pass
    with pytest.raises(ValueError, match="x"), Stopwatch(seconds, "teacher"):
        raise ValueError("x")
    assert 1.0 < seconds.teacher < 1.5
    assert seconds.decode == 0
