"""Two processes of DDP end with one model, whatever they began with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.methods import METHODS
from tests.processes import REPOSITORY, run_python
from tests.together.ddp_contract import NAMES, SHARED


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script, path = REPOSITORY / "tests/together/ddp_contract.py", tmp_path_factory.mktemp("ddp") / "report.json"
    run_python("-m torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_bases_that_differed_when_adapters_were_made(report: dict[str, Any]) -> None:
    """DDP makes the bases equal; what was prepared from them must be that of the first process too."""
    found = report["bases"]
    assert found.keys() == {f"{kind}, {name}" for kind, method in METHODS.items() if not method.composes for name in NAMES}
    for name, outputs in found.items():
        assert outputs["before"] > 0.01, name
        assert outputs["after"] == 0, name


def test_both_kinds_of_activation_checkpointing(report: dict[str, Any]) -> None:
    """Without a search for unused parameters. The reentrant kind is refused where layers share coefficients."""
    assert len(report["checkpointing"]) == 2 * (len(METHODS) + len(SHARED))
    for name, found in report["checkpointing"].items():
        if any(name == f"{kind}, {fields}, True" for kind, shared in SHARED.items() for fields in shared):
            assert "model.layers.0.self_attn" in found["error"], name
            assert "use_reentrant=False" in found["error"], name
        else:
            assert found == {"spread": 0}, name
