"""kill -9 of a process: the others end by themselves, the run goes on bit for bit (the long form is a benchmark)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"


@pytest.mark.slow
def test_four_kills(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--json", str(result)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(result.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["single", "ddp", "zero_2", "zero_3"]
    for row in rows:
        assert row["killed in training"] + row["killed in saving"] == 1
        assert row["losses compared"] >= 36 * row["processes"]
        assert (row["different"], row["missing"], row["others hang"]) == (0, 0, 0)
        assert row["others end after s"] < 60
        if row["processes"] > 1:
            assert "RuntimeError: Connection" in row["they say"]
