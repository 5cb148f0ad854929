"""Two processes train as one process does on the same global batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.flows.ddp import NAMES
from tests.flows.test_trainer import adapted, trainer
from tests.methods import METHODS
from tests.processes import REPOSITORY, run_python


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_python("-m torch.distributed.run", "--standalone", "--nproc-per-node", 2, REPOSITORY / "tests/flows/ddp.py", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world"] == 2
    assert set(report["models"]) == {f"{method}, {name}" for method in METHODS for name in NAMES}
    for name, found in report["models"].items():
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5), name
        assert found["losses"][-1] < found["losses"][0], name
        assert found["difference"] < 1e-4, name  # Adam divides by small second moments
        assert found["spread"] == 0, name
        assert not found["broadcast"], f"{name}: frozen tensors are sent around in each forward"

    one = trainer("llama", tmp_path / "one", adapted("llama", dropout=0.0), save_steps=6)
    one.train()
    expected = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    assert report["llama"] == pytest.approx(expected, abs=1e-4)  # what the Trainer logs is rounded to four digits
    first, second = (load_file(tmp_path / run / "checkpoint-6" / "adapter_model.safetensors") for run in ("llama", "one"))
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-3, atol=1e-4)
    # each rank has its own batch's statistics; those of the first are saved
    saved = load_file(tmp_path / "resnet" / "checkpoint-6" / "adapter_model.safetensors")
    moved = [tensor for key, tensor in saved.items() if key.endswith("num_batches_tracked")]
    assert moved
    assert all(int(tensor) == 6 for tensor in moved)
