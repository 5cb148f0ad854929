"""Two processes of DDP end with one model, whatever they began with."""

from __future__ import annotations

import json
from pathlib import Path

from tests.methods import METHODS
from tests.processes import REPOSITORY, run_python
from tests.together.ddp_contract import NAMES


def test_bases_that_differed_when_adapters_were_made(tmp_path: Path) -> None:
    """DDP makes the bases equal; what was prepared from them must be that of the first process too."""
    script, report = REPOSITORY / "tests/together/ddp_contract.py", tmp_path / "report.json"
    run_python("-m torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, report)
    found = json.loads(report.read_text())["bases"]
    assert found.keys() == {f"{kind}, {name}" for kind, method in METHODS.items() if not method.composes for name in NAMES}
    for name, outputs in found.items():
        assert outputs["before"] > 0.01, name
        assert outputs["after"] == 0, name
