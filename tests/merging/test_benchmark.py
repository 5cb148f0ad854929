"""The benchmark of the merge script runs and writes what its page says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.merge import main


def test_the_merge_benchmark_runs(tmp_path: Path) -> None:
    options = [
        "--quick",
        "--methods",
        "linear",
        "--no-mergekit",
        "--folder",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--name",
        "quick",
    ]
    report = main(options)
    assert json.loads((tmp_path / "quick.json").read_text()) == report
    assert set(report["methods"]["linear"]) == {"floor", "ours"}
    assert set(report["start"]) == {"import torch", "ours --help", "ours --dry-run"}
    ours = report["methods"]["linear"]["ours"][0]
    assert ours["cpu_s"] > 0
    assert 20 < ours["private_mb"] < 400
    assert report["start"]["ours --dry-run"][0]["cpu_s"] < report["start"]["import torch"][0]["cpu_s"]
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]
