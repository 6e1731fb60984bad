"""Who is silent, by a clock that is moved by hand."""

from cache_builder.workers.heartbeats import Heartbeats


def test_a_worker_is_silent_since_its_last_heartbeat_came() -> None:
    now = 100.0
    beats = Heartbeats(clock=lambda: now)
    assert beats.silent_s({"a": 7.0, "b": 7.0}) == {"a": 0.0, "b": 0.0}
    now = 110.0
    assert beats.silent_s({"a": 7.0, "b": 9.5}) == {"a": 10.0, "b": 0.0}
    now = 130.0
    assert beats.silent_s({"a": 8.0, "b": 9.5, "c": 1.0}) == {"a": 0.0, "b": 20.0, "c": 0.0}
    assert beats.silent_s({"b": 9.5}) == {"b": 20.0}
    assert beats.silent_s({"a": 8.0}) == {"a": 0.0}  # one that went and came again
