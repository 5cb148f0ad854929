"""Two processes train as one process does on the same global batch, and what they save is loaded by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed.ddp import HEALED, NAMES, SAVED
from tests.distributed.steps import RISES, evaluated
from tests.flows.test_trainer import adapted, trainer
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS
from tests.processes import report_of_two

CHECKPOINT = "checkpoint-6/adapter_model.safetensors"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of one run for all tests."""
    return report_of_two("ddp", tmp_path_factory)


def name_of(method: Method) -> str:
    return next(name for name, other in METHODS.items() if other is method)


def check_trainer(method: Method, ran: tuple[Path, dict[str, Any]], tmp_path: Path, **arguments: Any) -> None:
    """What two processes trained, whole and resumed, against one process on the same global batch."""
    folder, report = ran
    name = name_of(method)
    one = trainer("llama", tmp_path, adapted("llama", method, dropout=0.0, **method.steady), save_steps=6, **arguments)
    one.train()
    expected = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    assert report["trainer"][name] == pytest.approx(expected, abs=1e-4)  # what the Trainer logs is rounded to four digits
    files = [folder / name / run / CHECKPOINT for run in ("whole", "resumed")]
    whole, resumed, alone = (load_file(path) for path in [*files, tmp_path / CHECKPOINT])
    assert whole.keys() == resumed.keys() == alone.keys()
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key
        torch.testing.assert_close(tensor, alone[key], rtol=1e-3, atol=1e-4)


def test_two_processes_equal_one(ran: tuple[Path, dict[str, Any]]) -> None:
    _, report = ran
    assert report["world"] == 2
    expected = {f"{method}, {name}" for method in METHODS for name in NAMES} | {f"healing, {name}" for name in HEALED}
    assert set(report["models"]) == expected
    for name, found in report["models"].items():
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5), name
        if name not in RISES:
            assert found["losses"][-1] < found["losses"][0], name
        assert found["difference"] < 1e-4, name  # Adam divides by small second moments
        assert found["spread"] == 0, name
        assert not found["broadcast"], f"{name}: frozen tensors are sent around in each forward"


@each_method
def test_a_state_of_two_processes_is_resumed_and_the_adapter_loads_in_one(
    method: Method, ran: tuple[Path, dict[str, Any]]
) -> None:
    folder, report = ran
    name = name_of(method)
    resumed, went_on = report["models"][f"{name}, {SAVED}"]["resumed"]
    assert resumed == went_on
    assert torch.equal(
        evaluated(PeftModel.from_pretrained(MODELS[SAVED].model(), folder / name), SAVED),
        load_file(folder / name / "output.safetensors")["output"],
    )


@each_method
def test_the_trainer_with_two_processes(method: Method, ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """As with one on the same global batch; a run that was resumed ends where the whole one does."""
    check_trainer(method, ran, tmp_path)


def test_batch_norm_statistics_of_the_first_process_are_saved(ran: tuple[Path, dict[str, Any]]) -> None:
    """Each has those of its own rows."""
    saved = load_file(ran[0] / "resnet" / CHECKPOINT)
    moved = [tensor for key, tensor in saved.items() if key.endswith("num_batches_tracked")]
    assert moved
    assert all(int(tensor) == 6 for tensor in moved)
