from pathlib import Path

from click.testing import CliRunner

from radio_cache.reader import Cache
from trainer.cli import main

SMALL = ["--image-size", "32", "--steps", "2", "--batch-size", "2", "--set", "adaptor_width=8", "--device", "cpu"]


def test_a_run_ends_with_its_losses_and_the_next_commands(tiny_cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(main, ["--cache", str(tiny_cache.path), "--out", str(out), *SMALL])
    assert result.exit_code == 0, result.output
    assert "fake-a" in result.output
    assert f"Next: radio-eval knn --run {out}" in result.output
    assert "student e-radio-tiny: 2.6 M parameters" in result.output
    again = CliRunner().invoke(main, ["--cache", str(tiny_cache.path), "--out", str(out), *SMALL])
    assert again.exit_code == 0, again.output
    assert "2 steps (0 now)" in again.output


def test_errors_are_one_message_without_a_traceback(tiny_cache: Cache, tmp_path: Path) -> None:
    def output(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["--out", str(tmp_path / "run"), *arguments])
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return result.output

    cache = ["--cache", str(tiny_cache.path)]
    assert "no student is called 'e-radio-tinny'. Did you mean 'e-radio-tiny'" in output(
        *cache, "--student", "e-radio-tinny"
    )
    assert "--set lr: write it as KEY=VALUE" in output(*cache, "--set", "lr")
    assert "is a folder, but not a radio-cache store" in output("--cache", str(tmp_path))
    assert "does not exist" in output("--cache", str(tmp_path / "nowhere.zarr"))
    assert "--device cuda:99 cannot be used here" in output(*cache, "--device", "cuda:99")
    assert not (tmp_path / "run").exists()
