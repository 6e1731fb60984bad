from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.monitoring.tensorboard_log import TensorBoardLog


def test_tensorboard_shows_what_a_resumed_run_did_again_once(tmp_path: Path) -> None:
    stopped = TensorBoardLog(tmp_path / "events", 1)
    for step in (1, 2, 3):
        stopped.add(step, {"loss": float(step), "teacher/spatial": 0.5})
    stopped.close()
    resumed = TensorBoardLog(tmp_path / "events", 3)
    resumed.add(3, {"loss": 30.0})
    shown = EventAccumulator(str(tmp_path / "events")).Reload()  # before the file is closed
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.step for event in shown.Scalars("teacher/spatial")] == [1, 2]
    resumed.close()
