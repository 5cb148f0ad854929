"""A base on the meta device, as large as one likes, gets an adapter and then its weights, block by block."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, run

SEVEN_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def materialise(model: nn.Module, source: nn.Module) -> int:
    """Give every layer that owns parameters those of another model, one layer after the other; how many there were."""
    count = 0
    for name, module in source.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            place: Any = model.get_submodule(name)
            place = place.get_base_layer() if hasattr(place, "get_base_layer") else place
            for key, value in own.items():
                place._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=False)
            count += 1
    return count


def on_meta(build: Any) -> Any:
    with torch.device("meta"):
        return build().requires_grad_(False).eval()


@each_method
def test_weights_that_come_later_give_the_same_model(method: Method) -> None:
    pico = MODELS["llama"]
    expected = get_peft_model(pico.model(), method.make(pico, **pico.targets)).eval()
    late = on_meta(lambda: tf.LlamaForCausalLM(pico.model().config))
    torch.manual_seed(0)
    model = get_peft_model(late, method.make(pico, **pico.targets)).eval()
    assert materialise(late, pico.model()) > 10
    late.model.rotary_emb = pico.model().model.rotary_emb
    assert torch.equal(run(model, pico.batch()), run(expected, pico.batch()))


def test_an_adapter_on_seven_billion_parameters_takes_its_own_bytes_only() -> None:
    """Nothing of the base's size is made, on the meta device nor elsewhere."""
    base = on_meta(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SEVEN_BILLION)))
    assert sum(p.numel() for p in base.parameters()) > 6.5e9
    model = get_peft_model(base, METHODS["FLORA"].config(r=4, target_modules="all-linear"))
    real = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    assert sum(t.nbytes for t in real) < 40e6
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 10e6
