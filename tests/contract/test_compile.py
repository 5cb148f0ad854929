"""torch.compile over adapter switches: each set of active adapters is compiled once and found again."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters

from tests.methods import Method, each_method
from tests.pico import MODELS, run


@each_method
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler, of autograd.Function
def test_switching_back_and_forth_compiles_nothing_new(method: Method) -> None:
    """One graph for each of two adapters. Turning adapters off and on sets flags that torch guards: a few graphs more, once."""
    pico = MODELS["mlp"]
    model = get_peft_model(pico.model(), method.make(pico, init_weights=False, **pico.targets)).eval()
    model.add_adapter("other", method.make(pico, second=True, init_weights=False, **pico.targets))
    batch, expected = pico.batch(), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = run(model, batch)
    assert not torch.equal(expected["default"], expected["other"])
    base = run(pico.model(), batch)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def use(*names: str) -> int:
        """Run with one after the other, "" being none; how many graphs there are then."""
        for name in names:
            if name:
                model.set_adapter(name)
                torch.testing.assert_close(run(compiled, batch), expected[name])
            else:
                with model.disable_adapter():
                    torch.testing.assert_close(run(compiled, batch), base)
        return int(counters["stats"]["unique_graphs"])

    assert use("default", "other") == 2
    assert use("default", "other", "default", "other") == 2
    cycle = ("default", "other", "")
    known = use(*cycle, *cycle)
    assert use(*cycle, *cycle) == known
    assert not counters["graph_break"]
