"""FSDP2 trains as one process does, with sharded and replicated adapters; what it saves is loaded by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed.fsdp import NAMES, SAVED, WAYS
from tests.distributed.steps import RISES, evaluated
from tests.distributed.test_ddp import name_of
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS
from tests.processes import report_of_two

# In bfloat16 the halves of a batch round otherwise than the whole: 2^-8 of a gradient, which Adam turns into part of a step.
TOLERANCE = {"losses": {"bfloat16": 2e-2}, "difference": {"bfloat16": 4e-2}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of one run for all tests."""
    return report_of_two("fsdp", tmp_path_factory)


def test_two_processes_with_shares_equal_one(ran: tuple[Path, dict[str, Any]]) -> None:
    _, report = ran
    assert report["world"] == 2
    assert set(report["models"]) == {f"{method}, {name}" for method in METHODS for name in [*NAMES, *WAYS]}
    for name, found in report["models"].items():
        way = name.rpartition(", ")[2]
        assert found["losses"] == pytest.approx(found["expected"], rel=TOLERANCE["losses"].get(way, 1e-5)), name
        if name not in RISES:
            assert found["losses"][-1] < found["losses"][0], name
        assert found["difference"] < TOLERANCE["difference"].get(way, 1e-4), name  # Adam divides by small second moments
        resumed, went_on = found.get("resumed", [0, 0])
        assert resumed == went_on, name
    assert sum("resumed" in found for found in report["models"].values()) == 2 * len(METHODS)


@each_method
def test_the_whole_adapter_of_rank_0_loads_in_one_process(method: Method, ran: tuple[Path, dict[str, Any]]) -> None:
    folder = ran[0] / name_of(method)
    expected = load_file(folder / "output.safetensors")["output"]
    assert torch.equal(evaluated(PeftModel.from_pretrained(MODELS[SAVED].model(), folder), SAVED), expected)


def test_what_needs_whole_tensors_is_refused_by_name(ran: tuple[Path, dict[str, Any]]) -> None:
    refused = ran[1]["refusals"]
    where = "layers.{}.self_attn.q_proj.weight is sharded over several processes"
    shared = [f"{kind}, coefficients of another unit" for kind in ("ATLAS", "CONCRETE")]
    for what, layer in (("merge", 0), ("export", 0), *((what, 1) for what in shared)):
        assert where.format(layer) in refused[what], what
    assert "it can be merged there" in refused["merge"]
    for what, way_out in zip(shared, ("granularity='block'", "learn_coefficients='layer'"), strict=True):
        assert way_out in refused[what], what
