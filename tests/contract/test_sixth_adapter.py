"""A new method is one file: a config, a Delta and a model class. Here are two, whole, and all that a user does with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from peft_subspace import Delta, Geometry, SubspaceConfig, SubspaceModel, register
from tests.pico import MODELS, run, train

# The first file: scale every output feature, W' = diag(1 + d) W ----------------------------------------------------


@dataclass
class GainConfig(SubspaceConfig):
    """dW = diag(d) W with a trained d."""

    method: ClassVar[str] = "TOYGAIN"
    title: ClassVar[str] = "Gain"
    paper: ClassVar[str] = "-"
    patterns: ClassVar[dict[str, str]] = {}

    start: float = field(default=0.0)


class GainDelta(Delta):
    """d `[out]` is trained; W `[out, in]` is kept as a frozen copy."""

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        self.gain = nn.Parameter(torch.full(geometry.shape[:1], config.start))
        self.register_buffer("weight", torch.zeros(geometry.shape))

    def prepare(self, weight: Any, siblings: Any, saved: Any = None) -> None:
        self.weight.copy_(weight())

    def forward(self, x: Tensor, y0: Tensor, out: Tensor) -> Tensor:
        return self.geometry.dense(x, self.delta_weight(None).to(out.dtype), out)

    def delta_weight(self, weight: Any) -> Tensor:
        return self.gain.view(-1, *[1] * (self.weight.ndim - 1)) * self.weight


class GainModel(SubspaceModel):
    prefix = "toygain_"
    delta_cls = GainDelta


# The second: a Delta that stands in for its base layer ---------------------------------------------------------------------


@dataclass
class SwapConfig(SubspaceConfig):
    """The layer's output is that of one trained matrix, which starts as W."""

    method: ClassVar[str] = "TOYSWAP"
    title: ClassVar[str] = "Swap"
    paper: ClassVar[str] = "-"
    patterns: ClassVar[dict[str, str]] = {}


class SwapDelta(Delta):
    replaces_base: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        self.matrix = nn.Parameter(torch.zeros(geometry.shape))

    def prepare(self, weight: Any, siblings: Any, saved: Any = None) -> None:
        with torch.no_grad():
            self.matrix.copy_(weight())

    def call(self, base_layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return nn.functional.linear(x, self.matrix.to(x.dtype), base_layer.bias)


class SwapModel(SubspaceModel):
    prefix = "toyswap_"
    delta_cls = SwapDelta


# Tests -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Registered for this file only: PEFT's tables are shared by all tests of the process."""
    register(GainConfig, GainModel)
    register(SwapConfig, SwapModel)
    yield
    for name in ("TOYGAIN", "TOYSWAP"):
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
            table.pop(PeftType[name])
        PeftType._member_names_.remove(name)
        del PeftType._member_map_[name], PeftType._value2member_map_[name]
        if name in getattr(PeftType, "_hashable_values_", []):  # Python 3.12 and later
            PeftType._hashable_values_.remove(name)
        type.__delattr__(PeftType, name)


MODELS_WITH_GAIN = ["mlp", "conv", "batch norm", "mha", "llama", "gpt2", "moe"]


@pytest.mark.parametrize("name", MODELS_WITH_GAIN)
def test_one_file_is_enough(name: str, tmp_path: Path) -> None:
    """Wrap, train, save, load, switch off, merge: nothing else had to be written."""
    pico = MODELS[name]
    batch, base = pico.batch(), run(pico.model(), pico.batch())
    model = get_peft_model(pico.model(), GainConfig(**pico.targets))
    assert torch.equal(run(model, batch), base)
    losses = train(model, batch, steps=5)
    assert losses[-1] < losses[0]
    trained = run(model, batch)
    model.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type is PeftType["TOYGAIN"]
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path))
    assert torch.equal(run(loaded, batch), trained)
    with loaded.disable_adapter():
        assert torch.equal(run(loaded, batch), base)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(run(merged, batch), trained, rtol=1e-4, atol=1e-5)  # float32 through a model
    assert type(model.base_model) is GainModel


def test_a_loaded_adapter_is_not_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the weight comes from the file: a decomposition would be done twice otherwise."""
    pico = MODELS["mlp"]
    model = get_peft_model(pico.model(), GainConfig(**pico.targets, start=0.5))
    model.save_pretrained(str(tmp_path))
    monkeypatch.setattr(GainDelta, "prepare", lambda self, *args: pytest.fail("prepared on loading"))
    loaded = PeftModel.from_pretrained(pico.model(seed=9), str(tmp_path))  # even on another base
    for ours, theirs in zip(loaded.modules(), model.modules(), strict=True):
        if isinstance(ours, GainDelta):
            assert torch.equal(ours.weight, theirs.weight)  # type: ignore[arg-type]


def test_frozen_tensors_stay_float32_on_a_narrow_base() -> None:
    pico = MODELS["mlp"]
    model = get_peft_model(pico.model(torch.bfloat16), GainConfig(**pico.targets))
    deltas = [module for module in model.modules() if isinstance(module, GainDelta)]
    assert {delta.weight.dtype for delta in deltas} == {delta.gain.dtype for delta in deltas} == {torch.float32}
    assert not any(key.endswith(".weight") and "toygain" in key for key, p in model.named_parameters())


def test_a_method_without_an_exact_sum_says_so() -> None:
    pico = MODELS["mlp"]
    model = get_peft_model(pico.model(), GainConfig(**pico.targets))
    with pytest.raises(NotImplementedError, match="GainDelta has no exact weighted sum"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("other", [GainConfig, SwapConfig])
def test_a_delta_may_stand_in_for_the_base_layer_but_only_one(other: type[SubspaceConfig]) -> None:
    pico = MODELS["mlp"]
    batch, base = pico.batch(), run(pico.model(), pico.batch())
    model = get_peft_model(pico.model(), SwapConfig(**pico.targets))
    torch.testing.assert_close(run(model, batch), base)
    calls: list[Any] = []
    for layer in dict(model.base_model.named_subspace_layers()).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    run(model, batch)
    assert not calls, "the base layer is not called"
    if other is GainConfig:  # PEFT keeps one method to one model
        with pytest.raises(ValueError, match="different peft types"):
            model.add_adapter("other", other(**pico.targets))
        return
    model.add_adapter("other", other(**pico.targets))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"'default', 'other'.*toyswap\.Linear.*stands in.*one at a time"):
        run(model, batch)
    model.set_adapter("other")
    torch.testing.assert_close(run(model, batch), base)


def test_a_clash_of_names_is_refused() -> None:
    class Other(SubspaceModel):
        prefix = "flora_"
        delta_cls = GainDelta

    with pytest.raises(ValueError, match="prefix"):
        register(GainConfig, Other)
