"""ZeRO-3 trains as one process does. `make zero` runs it: DeepSpeed has an environment of its own and compiles at first."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed.steps import RISES, ZERO_NAMES, evaluated
from tests.distributed.test_ddp import check_trainer, name_of
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS
from tests.processes import report_of_two

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (`make zero` installs it)"
    ),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of one run for all tests."""
    return report_of_two("zero", tmp_path_factory, DS_ACCELERATOR="cpu")


def test_two_processes_with_shares_equal_one(ran: tuple[Path, dict[str, Any]]) -> None:
    report = ran[1]
    assert report["world"] == 2
    assert set(report["models"]) == {f"{method}, {name}" for method in METHODS for name in ZERO_NAMES}
    for name, found in report["models"].items():
        assert found["cut"], f"{name}: parameters are whole, so nothing is tested"
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5), name
        if name not in RISES:
            assert found["losses"][-1] < found["losses"][0], name


@each_method
def test_the_trainer_with_zero_3(method: Method, ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """As with one process on the same global batch; a run that was resumed ends where the whole one does."""
    check_trainer(method, ran, tmp_path, max_grad_norm=0.0)


@each_method
def test_the_file_of_two_processes_gives_the_same_output_in_one(method: Method, ran: tuple[Path, dict[str, Any]]) -> None:
    for run in ("whole", "resumed"):
        folder = ran[0] / name_of(method) / run
        alone = PeftModel.from_pretrained(MODELS["llama"].model(seed=3), folder / "checkpoint-6")
        torch.testing.assert_close(evaluated(alone, "llama"), load_file(folder / "output.safetensors")["output"])
