"""The pytest-benchmark suites of ``benchmarks/suites``, which the default run leaves out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITES = {"test_ops", "test_attention", "test_block", "test_step", "test_stages", "test_end_to_end", "test_cold_start"}


def run_suites(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/suites", "--device", "cpu", *arguments]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)


def test_a_suite_measures_and_keeps_the_environment(tmp_path):
    kept = tmp_path / "result.json"
    done = run_suites("-k", "(swiglu and small) or test_start[import]", f"--benchmark-json={kept}")
    assert done.returncode == 0, done.stdout
    record = json.loads(kept.read_text())
    assert record["machine_info"]["flux2-local"]["torch"]
    found = {row["name"]: row for row in record["benchmarks"]}
    assert set(found) == {
        "test_op[swiglu-reference-small]", "test_op[swiglu-native-small]", "test_start[import]",
    }  # fmt: skip
    assert all(row["stats"]["median"] > 0 for row in found.values())
    rounds = {name: row["stats"]["rounds"] for name, row in found.items()}
    assert rounds.pop("test_start[import]") == 5 and set(rounds.values()) == {50}


def test_there_is_a_suite_for_everything():
    assert {path.stem for path in (ROOT / "benchmarks" / "suites").glob("test_*.py")} == SUITES


@pytest.mark.slow
def test_every_suite_runs():
    done = run_suites("--benchmark-disable", "-k", "not klein")
    assert done.returncode == 0, done.stdout
