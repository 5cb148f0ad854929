"""Layers that PEFT can call and cannot dequantise: GPTQ, AWQ, AQLM, EETQ. A stand-in for all, so no library is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn

from peft_subspace.base import geometry
from tests.methods import METHODS, Method
from tests.pico import Pico, run, train
from tests.pools import folder, write_vector


class Packed(nn.Module):
    """As GPTQ's and AWQ's layers: buffers of packed integers, no `weight`, a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 16, 8, None
        self.register_buffer("qweight", torch.randint(-8, 8, (8, 16), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Packed(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


PICO = Pico(Net, lambda: {"x": torch.randn(4, 16)}, {"target_modules": ["layer"]})
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, which asks for the sizes of a layer
READS_NOTHING = ["FLORA"]  # an aTLAS pool is paired with parameters, of which such a layer has none


@pytest.fixture(params=["gptq", "awq"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found = geometry.resolve_quantization_backend

    def resolve(module: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend(request.param) if isinstance(module, Packed) else found(module, **kwargs)

    monkeypatch.setattr(geometry, "resolve_quantization_backend", resolve)
    return str(request.param)


def config(method: Method, kind: str) -> Any:
    fields: dict[str, Any] = {**method.fields, **PICO.targets}
    if method.composes:  # the layer has no parameter from which `tests.pools` could make a vector
        low = {"layer.weight::A": torch.randn(2, 16), "layer.weight::B": torch.randn(8, 2)}
        tensors = low if method.vector_rank else {"layer.weight": torch.randn(8, 16)}
        fields["pool"] = {"task": write_vector(folder() / f"packed-{kind}-{method.vector_rank}.safetensors", tensors)}
    return method.config(**fields)


@pytest.mark.parametrize("name", READS_NOTHING)
def test_a_method_that_reads_no_weight_trains_saves_and_loads(name: str, kind: str, tmp_path: Any) -> None:
    model = get_peft_model(PICO.model(), config(METHODS[name], kind))
    losses = train(model, PICO.batch())
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(PICO.model(), str(tmp_path))
    assert torch.equal(run(loaded.eval(), PICO.batch()), run(model, PICO.batch()))
    with pytest.raises(ValueError, match=rf"A {kind} layer cannot be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in READS_NOTHING])
def test_a_method_that_reads_the_weight_is_refused_by_name(name: str, kind: str) -> None:
    model = PICO.model()
    unread = "1 of its 1 tensors is a parameter of no layer of this model: layer.weight"
    with pytest.raises(ValueError, match=rf"layer: a {kind} layer can be called, but|{unread}"):
        get_peft_model(model, config(METHODS[name], kind))
    assert isinstance(model.layer, Packed), "the model was left as it was"
