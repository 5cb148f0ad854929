"""Threads that share one model, as those of a server do: what each gets is what one thread alone gets, bit for bit."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.methods import Method, each_method
from tests.pico import LAYERS, MODELS, Pico, run

pytestmark = pytest.mark.filterwarnings("ignore:PELA leaves")

THREADS, FORWARDS = 3, 200
KINDS: dict[str, Pico] = {
    **{name: LAYERS[name] for name in ("linear", "embedding", "conv2d", "router", "conv, own forward", "experts")},
    **{name: MODELS[name] for name in ("mha", "encoder", "moe", "batch norm", "vit", "llama")},
}
EVERYTHING: dict[str, Any] = {"target_modules": None, "target_parameters": None, "task_type": None}  # norms, and holders


@pytest.fixture(autouse=True)
def threads_that_alternate() -> Iterator[None]:
    """A thread gives way after a microsecond, and not after five milliseconds, which is a whole forward here."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(call: Callable[[int], Any], count: int = FORWARDS) -> list[Any]:
    """What `count` calls return; three threads start together and share them."""
    start = threading.Barrier(THREADS)

    def work(first: int) -> list[Any]:
        start.wait()
        return [call(number) for number in range(first, count, THREADS)]

    with ThreadPoolExecutor(THREADS) as threads:
        parts = list(threads.map(work, range(THREADS)))
    return [parts[number % THREADS][number // THREADS] for number in range(count)]


def fields_of(method: Method, pico: Pico) -> dict[str, Any]:
    return {"init_weights": False, **pico.targets, **(EVERYTHING if method.composes else {})}


def adapted(method: Method, pico: Pico, **fields: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(pico.model(), method.make(pico, **{**fields_of(method, pico), **fields})).eval()


def wrong(model: nn.Module, pico: Pico, **kwargs: Any) -> int:
    """How many of 200 forwards from three threads are not those of one thread. Every fourth is of other samples."""
    batches = [pico.batch(seed=seed) for seed in range(4)]
    found = in_threads(lambda number: run(model, batches[number % 4], **kwargs))
    expected = [run(model, batch, **kwargs) for batch in batches]
    return sum(not torch.equal(tensor, expected[number % 4]) for number, tensor in enumerate(found))


def test_lora_on_linear_layers() -> None:
    """The control."""
    pico = MODELS["llama"]
    config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    assert wrong(get_peft_model(pico.model(), config).eval(), pico) == 0


@each_method
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_of_one_model(method: Method, kind: str) -> None:
    """The first ones, too, which compose what is kept afterwards."""
    pico = KINDS[kind]
    model = adapted(method, pico)
    assert wrong(model, pico) == 0


def known_outside(model: nn.Module, seen: list[nn.Module]) -> None:
    """A hook on every module of the base, which gets the module itself."""
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            module.register_forward_hook(lambda module, args, out: seen.append(module))


def refuse(*_: Any) -> None:
    raise RuntimeError("not now")


@each_method
@pytest.mark.parametrize("kind", ["experts", "mha", "vit", "batch norm"])
def test_modules_with_hooks(method: Method, kind: str) -> None:
    """Nothing may stand in for these: they wait for one another, also after a copy, a pickle and a call that failed."""
    pico, seen = KINDS[kind], list[nn.Module]()
    model = adapted(method, pico)
    expected = run(model, pico.batch())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        known_outside(twin, seen)
        handles = [m.register_forward_hook(refuse) for m in twin.modules() if not isinstance(m, BaseTunerLayer)]
        with pytest.raises(RuntimeError, match="not now"):
            run(twin, pico.batch())
        for handle in handles:
            handle.remove()
        assert wrong(twin, pico) == 0
        assert torch.equal(run(twin, pico.batch()), expected)
        assert set(map(id, seen)) <= set(map(id, twin.modules()))
        seen.clear()


@each_method
@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_that_calls_itself(method: Method, hooked: bool) -> None:
    """Reentrant calls of one thread end, and leave the outer call its weights."""

    class Twice(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            if around:
                around.pop()(*args, **kwargs)
                self.noted = "on the module"
            return super().forward(*args, **kwargs)

    pico, around = MODELS["mha"], list[nn.Module]()
    model = adapted(method, pico)
    layer = model.base_model.model.attention
    expected = run(model, pico.batch())
    layer.base_layer.__class__ = Twice
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    around.append(layer)
    assert torch.equal(run(model, pico.batch()), expected)
    assert not around
    assert layer.base_layer.noted == "on the module"


@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_threads(method: Method, reentrant: bool) -> None:
    """Backward in threads, with activation checkpointing: the forward of a segment runs again there."""
    pico = MODELS["mha"]
    model = adapted(method, pico, **method.steady)
    attention = model.base_model.model.attention
    batch = pico.batch()
    x = batch["x"].requires_grad_()

    def gradients(number: int) -> list[Tensor]:
        def segment(x: Tensor) -> Tensor:
            return attention(x, x, x)[0]

        found = checkpoint(segment, x * (1 + number % 2), use_reentrant=reentrant)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if reentrant:  # which knows `backward` only
            found.square().sum().backward()
            return []
        return list(torch.autograd.grad(found.square().sum(), trained, allow_unused=True))

    if reentrant:
        in_threads(gradients, 30)
        total = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        for number in range(30):
            gradients(number)
        for one, other in zip(total, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # the order of the sum
        return
    expected = [gradients(number) for number in range(2)]
    for number, found in enumerate(in_threads(gradients, 60)):
        for one, other in zip(found, expected[number % 2], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@each_method
@pytest.mark.parametrize("kind", ["mlp", "mha", "llama", "batch norm"])
def test_another_adapter_for_each_sample(method: Method, kind: str) -> None:
    """One thread's names are not another's, whose whole batch may be of the active adapter (where PEFT's LoRA fails)."""
    pico = KINDS.get(kind, MODELS[kind])
    if method.composes and kind == "llama":
        pico = replace(pico, targets={"target_modules": ["q_proj", "embed_tokens", "input_layernorm"]})
    model = adapted(method, pico, target_parameters=None, **pico.targets)
    model.add_adapter("other", method.make(pico, second=True, **{**fields_of(method, pico), **pico.targets}))
    model.eval()
    orders = [{"adapter_names": names} for names in (["default", "other"] * 2, ["other", "__base__", "default", "other"])]
    orders.append({})
    batch = pico.batch()
    found = in_threads(lambda number: run(model, batch, **orders[number % 3]))
    expected = [run(model, batch, **order) for order in orders]
    assert not torch.equal(expected[0], expected[1])
    assert sum(not torch.equal(tensor, expected[number % 3]) for number, tensor in enumerate(found)) == 0
    assert not any(layer._forward_pre_hooks for layer in model.modules() if isinstance(layer, BaseTunerLayer))


@each_method
def test_the_first_use_of_a_file(method: Method, tmp_path: Path) -> None:
    """What is made from the weights at the first use is made once."""
    pico = MODELS["mlp"]
    model = adapted(method, pico)
    model.save_pretrained(str(tmp_path))
    alone, loaded = (PeftModel.from_pretrained(pico.model(), tmp_path) for _ in range(2))
    batch = pico.batch()
    expected = run(alone, batch)
    assert all(torch.equal(found, expected) for found in in_threads(lambda _: run(loaded, batch), 12))
