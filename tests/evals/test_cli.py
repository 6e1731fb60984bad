"""radio-eval as a user meets it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from evals.cli import main
from evals.commands import knn as command
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE


def test_knn_prints_protocol_table_and_notes(make_cache, make_run) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", seed=1)
    run = make_run("run", bank.path)
    result = CliRunner().invoke(
        main, ["knn", "--bank", str(bank.path), "--queries", str(queries.path), "--run", str(run), "-k", "5"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "k-NN, k = 5, cosine, votes exp(similarity / 0.07); 20 queries against a bank of 20"
    )
    assert "of best teacher" in result.stdout
    assert "student → alpha" in result.stdout
    assert "note: 20 images tested" in result.stdout
    assert "images/s" in result.stderr
    assert "images/s" not in result.stdout


def test_json_holds_protocol_versions_and_data_identity(make_cache, tmp_path) -> None:
    bank = make_cache("bank")
    file = tmp_path / "sub" / "knn.json"
    result = CliRunner().invoke(main, ["knn", "--bank", str(bank.path), "--json", str(file)])
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())
    assert (record["k"], record["temperature"], record["leave_one_out"]) == (19, 0.07, True)
    assert record["protocol"].startswith("k-NN, k = 19, cosine")
    assert record["bank"]["images"] == 20
    assert len(record["bank"]["sha256_of_image_digests"]) == 64
    assert record["rows"][0]["name"] == "alpha"
    assert {"radio-cache", "python", "torch", "numpy"} <= record["versions"].keys()
    assert (record["settings"]["seed"], record["settings"]["bank"]) == (0, str(bank.path))
    assert not [line for line in result.stdout.splitlines() if line != line.rstrip()]


def test_sweep_prints_accuracy_by_k_and_models_have_rows(make_cache) -> None:
    bank = make_cache("bank")
    arguments = ["--bank", str(bank.path), "-k", "5", "--sweep", "1", "--sweep", "9"]
    arguments += ["--model", "net=timm:vit_tiny_patch16_224@32", "--weights", "random"]
    result = CliRunner().invoke(main, ["knn", *arguments])
    assert result.exit_code == 0, result.output
    assert "top-1 by the number of neighbours" in result.stdout
    assert " ".join(result.stdout.split()).count("k = 1 k = 5 k = 9") == 1
    assert "timm vit_tiny_patch16_224, random weights, 32 px" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "arguments", [[], ["--bank", "nowhere.zarr"], ["--run", "nowhere"], ["--limit", "1", "--run", "x"]]
)
def test_errors_are_one_message_without_traceback(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["knn", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_help_loads_no_torch_and_its_defaults_are_the_papers() -> None:
    defaults = {option.name: option.default for option in command.knn.params}
    assert (defaults["k"], defaults["temperature"]) == (PAPER_K, PAPER_TEMPERATURE) == (20, 0.07)
    code = "import sys, evals.cli; sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("words", "place"), [(["knn", "--bank"], "bank"), (["rank", "--images"], "images")])
def test_a_seed_draws_other_images_and_the_same_ones_again(make_cache, tmp_path, words: list[str], place: str) -> None:
    bank = make_cache("bank")
    digests: list[str] = []
    for seed in ("0", "1", "1"):
        arguments = [*words, str(bank.path), "--limit", "8", "--seed", seed, "--json", str(tmp_path / "r.json")]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        digests.append(json.loads((tmp_path / "r.json").read_text())[place]["sha256_of_image_digests"])
    assert digests[0] != digests[1] == digests[2]
