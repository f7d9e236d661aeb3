"""The benchmark runs, and its figures are figures.

The floors here are far below what is promised: a loaded machine must not fail the suite, a client
that copies through Python objects or waits for a poll must.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvproto import nixlib

ROOT = Path(__file__).parents[2]
RATIO_FLOOR = 0.05
LOOKUP_RATIO_CEILING = 100.0
RESTART_CEILING_S = 30.0


@pytest.mark.timeout(240)
def test_quick_benchmark_measures_every_row(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())

    rows = {(r["operation"], r["clients"], r["batch_blocks"]): r for r in result["transfer"]}
    assert set(rows) == {(o, c, b) for o in ("push", "pull") for c in (1, 2) for b in (1, 16)}
    assert result["notes"] == []
    for row in rows.values():
        assert row["memcpy_gb_s"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["floor_met"] == (row["ratio"] >= row["floor"])
    assert rows["push", 1, 16]["ratio"] > RATIO_FLOOR
    assert rows["pull", 1, 16]["ratio"] > RATIO_FLOOR

    assert ("nixl" in result) == nixlib.available()
    moved = {(r["way"], r["operation"]): r for r in result.get("nixl", [])}
    ways = {(w, o) for w in ("move", "whole") for o in ("push", "pull")}
    assert set(moved) == (ways if "nixl" in result else set())
    for row in moved.values():
        assert row["ratio"] > RATIO_FLOOR
        assert row["floor_met"] == (row["ratio"] >= row["floor"])

    assert 0 < result["lookup"]["ratio"] < LOOKUP_RATIO_CEILING
    restart = result["restart"]
    assert restart["restored_blocks"] == restart["blocks"]
    assert restart["dead_s"] <= restart["ready_s"] < RESTART_CEILING_S
    assert restart["looked_up_s"] <= restart["pulled_s"] < RESTART_CEILING_S

    for words in ("memcpy GB/s", "lookup of 1024 keys", "s after SIGKILL"):
        assert words in done.stdout
