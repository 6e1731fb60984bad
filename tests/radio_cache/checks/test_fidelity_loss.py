"""Shards that kept less than was asked for are named, with figures and the cure; those that differ by chance are not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radio_cache import Cache
from radio_cache.checks.fidelity_loss import low_fidelity_of, low_fidelity_shards
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import Receipt, TeacherSpec, receipt_path
from radio_cache.statistics.fidelity import Fidelity

ASKED = {"name": "klt", "packing": "packed", "fidelity": 0.99}


@pytest.fixture
def drifting(whole_cache: Path, tmp_path: Path) -> Any:
    """make(codec extras, cosines by shard) -> a cache whose teacher fake-a says so; no number of it is touched."""

    def make(told: dict[str, Any], *cosines: float) -> Cache:
        path = Path(shutil.copytree(whole_cache, tmp_path / "c.zarr"))
        document = path / "teachers/fake-a/zarr.json"
        data = json.loads(document.read_text())
        spec = TeacherSpec.from_json(data["attributes"]["radio_cache"])
        codec = CodecRecord.from_json(spec.codec.to_json() | told)
        data["attributes"]["radio_cache"] = replace(spec, codec=codec).to_json()
        document.write_text(json.dumps(data))
        for shard, cosine in enumerate(cosines):
            file = path / receipt_path("fake-a", shard)
            receipt = Receipt.from_json(json.loads(file.read_text()))
            fidelity = Fidelity(num_tokens=64, cosine=cosine, cosine_worst=0.5, squared_error=1.0, variance=2.0)
            changed = Receipt(**{**vars(receipt), "fidelity": fidelity})
            file.write_text(json.dumps(changed.to_json()))
        return Cache(path)

    return make


def test_shards_that_lost_much_more_than_allowed_are_named_the_worst_first(drifting: Any) -> None:
    drift = low_fidelity_of(drifting({"asked": ASKED}, 0.985, 0.9893, 0.98), "fake-a")
    assert drift is not None
    assert drift.shards == ((2, 0.98), (0, 0.985))
    told = drift.describe("c.zarr")
    assert "fake-a: 2 of 3 shards are clearly below the requested mean cosine of 0.9900" in told
    assert "shard 2 (0.9800), 0 (0.9850)" in told
    assert "radio-cache drop-teacher c.zarr fake-a, and the build command again" in told


def test_shards_that_differ_by_chance_are_not(drifting: Any) -> None:
    assert low_fidelity_shards(drifting({"asked": ASKED}, 0.9898, 0.9912, 0.9878)) == []


def test_a_step_is_compared_with_what_calibration_kept(drifting: Any) -> None:
    told = {"asked": {"name": "klt", "packing": "zstd", "step": 0.4}, "calibration": {"cosine": 0.997}}
    drift = low_fidelity_of(drifting(told, 0.9972, 0.9971, 0.99), "fake-a")
    assert drift is not None
    assert (drift.requested, drift.shards) == (0.997, ((2, 0.99),))


@pytest.mark.parametrize("told", [{}, {"asked": "much"}, {"asked": {"fidelity": "0.99"}}, {"asked": {"name": "half"}}])
def test_where_nothing_was_asked_nothing_drifts(drifting: Any, told: dict[str, Any]) -> None:
    assert low_fidelity_shards(drifting(told, 0.2, 0.3, 0.4)) == []
