"""torch.compile over adapter switches: each set of active adapters is compiled once and found again."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters

from tests.methods import Method, each_method
from tests.pico import MODELS, loss, run

pytestmark = [  # both are torch's compiler's own; as errors they would stop it within a backend
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
NAMES = ("default", "other")
PICO = MODELS["mlp"]


def adapted_twice(method: Method, **fields: Any) -> Any:
    """Two adapters of different sizes, each of which has been used."""
    fields = {"init_weights": False, **PICO.targets, **fields}
    model = get_peft_model(PICO.model(), method.make(PICO, **fields)).eval()
    model.add_adapter("other", method.make(PICO, second=True, **fields))
    for name in NAMES:
        model.set_adapter(name)
        run(model, PICO.batch())
    return model


def compiled_anew(model: Any, backend: str) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, fullgraph=True, backend=backend)


def graphs() -> int:
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@each_method
def test_switching_back_and_forth_compiles_nothing_new(method: Method) -> None:
    """One graph for each of two adapters. Turning adapters off and on sets flags that torch guards: a few graphs more, once."""
    model, batch, expected = adapted_twice(method), PICO.batch(), {}
    for name in NAMES:
        model.set_adapter(name)
        expected[name] = run(model, batch)
    assert not torch.equal(expected["default"], expected["other"])
    base = run(PICO.model(), batch)
    compiled = compiled_anew(model, "aot_eager")

    def use(*names: str) -> int:
        """Run with one after the other, "" being none; how many graphs there are then."""
        for name in names:
            if name:
                model.set_adapter(name)
                torch.testing.assert_close(run(compiled, batch), expected[name])
            else:
                with model.disable_adapter():
                    torch.testing.assert_close(run(compiled, batch), base)
        return graphs()

    assert use(*NAMES) == 2
    assert use(*NAMES, *NAMES) == 2
    cycle = (*NAMES, "")
    known = use(*cycle, *cycle)
    assert use(*cycle, *cycle) == known


@each_method
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_one_and_then_the_other_compiles_two_graphs(method: Method, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is no g++")
    fewer = {"target_modules": ["first"]} if backend == "inductor" else {}  # half a minute of a compiler less
    model = adapted_twice(method, **method.steady, **fewer).train()

    def gradients(call: Any, name: str) -> dict[str, Tensor]:
        model.set_adapter(name)
        model.zero_grad()
        loss(call, PICO.batch()).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    expected = {name: gradients(model, name) for name in NAMES}
    compiled = compiled_anew(model, backend)
    for step, name in enumerate(NAMES * 3):
        found = gradients(compiled, name)
        assert found.keys() == expected[name].keys()
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name][key])
        assert graphs() == min(step + 1, 2)
