"""Two processes train: what one of them alone sees counts for both, and what is said is of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.methods import METHODS
from tests.processes import report_of_two
from tests.together.two import PATIENCE, apart, run_of

COMPOSING = [name for name, method in METHODS.items() if method.composes]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of one run for all tests."""
    return report_of_two("two", tmp_path_factory, "together")


@pytest.mark.parametrize("select", ["best", "metric"])
@pytest.mark.parametrize("name", COMPOSING)
def test_looks_that_differ_by_process(name: str, select: str, ran: tuple[Path, dict[str, Any]]) -> None:
    """Every process has its own held-out rows and its own accuracy; both keep the same look and end at the same step."""
    folder, report = ran
    assert report["world"] == 2
    one, other = (report[f"{name}, {select}"][rank] for rank in range(2))
    assert one["looks"] == other["looks"]
    assert one["own"] != other["own"], "the processes see the same, and nothing is tested"
    for look, mine, theirs in zip(one["looks"], one["own"], other["own"], strict=True):
        assert look["metrics"]["accuracy"] == pytest.approx((mine + theirs) / 2)
    tensors = [load_file(folder / f"{name}, {select}-{rank}.safetensors") for rank in range(2)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensors[1][key] == value).all() for key, value in tensors[0].items())
    if select == "metric":
        last = one["looks"][-1]
        best = max(look["metrics"]["accuracy"] for look in one["looks"] if look["phase"] == last["phase"])
        assert one["selected"]["metrics"]["accuracy"] == best
        assert last["step"] <= 2 * PATIENCE, "patience ends the run"


def test_names_that_differ_by_process_are_refused(ran: tuple[Path, dict[str, Any]]) -> None:
    said = "evaluate returned other names in some processes: [['accuracy 0', 'one'], ['accuracy 1', 'one']]"
    assert all(error.startswith(said) for error in ran[1]["other names"])


def test_a_folder_of_another_run_is_refused_in_every_process(ran: tuple[Path, dict[str, Any]]) -> None:
    """Only the main process asks for the lock."""
    assert len(ran[1]["locked"]) == 2
    for error in ran[1]["locked"]:
        assert error.startswith(f"{ran[0] / 'locked' / 'checkpoint.lock'}: another process is writing this result")


def test_a_resume_with_another_number_of_processes_names_both(ran: tuple[Path, dict[str, Any]]) -> None:
    said = r"was written with other arguments: processes \(2 there, 1 here\)\. Go on with those, or choose another output_dir"
    (folder, report), name = ran, COMPOSING[0]
    run = run_of(METHODS[name], Accelerator(cpu=True), folder / f"{name}, best", apart, report[f"{name}, pool"])
    with pytest.raises(ValueError, match=said):
        run.train(resume=True)


def test_healing_logs_the_parts_of_all_processes(ran: tuple[Path, dict[str, Any]]) -> None:
    """Their sum is the loss, of which transformers logs the mean over the processes."""
    logged = ran[1]["healing"]
    assert len(logged) == 3
    for entry in logged:
        parts = [value for name, value in entry.items() if name.startswith("loss_")]
        assert len(parts) > 1
        assert sum(parts) == pytest.approx(entry["loss"], abs=1e-4)  # the Trainer rounds it to four digits
    assert ran[1]["own rows"][0] != pytest.approx(ran[1]["own rows"][1], rel=0.01), "the processes see the same rows"
