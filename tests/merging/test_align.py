"""Weight matching: permutations change nothing, and a planted one is found exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from peft_subspace.merging.align import Permutation, Place, apply, find_permutations, match

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 8, "patch_size": 4}
MODELS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES)),
    "llama-bias": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, attention_bias=True, mlp_bias=True, **SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=50, num_key_value_heads=2, head_dim=8, **SIZES)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=50, **SIZES)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE, **SIZES)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**IMAGE, mlp_ratio=2, **SIZES)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """With random norms and biases: their initial ones and zeros would hide a permutation that forgets them."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, tf.ViTForImageClassification | tf.Dinov2ForImageClassification):
        return model(torch.randn(3, 3, 8, 8, generator=generator)).logits
    return model(torch.randint(0, 50, (3, 7), generator=generator)).logits


def permutations_of(model: nn.Module, **options: Any) -> list[Permutation]:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return find_permutations(shapes, model.config.to_dict(), **options)


def planted(permutations: list[Permutation], seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {each.name: torch.randperm(each.count, generator=generator) for each in permutations}


# Dinov2's classifier reads two tokens side by side, so its columns are no single stream
RESIDUAL = [name for name in MODELS if name != "dinov2"]


@pytest.mark.parametrize(("name", "residual"), [(n, False) for n in MODELS] + [(n, True) for n in RESIDUAL])
def test_a_permutation_changes_no_output(name: str, residual: bool) -> None:
    model = build(name)
    permutations = permutations_of(model, residual=residual)
    assert len(permutations) == 2 * 2 + residual, "an MLP and heads in each of two layers"
    before = logits(model)
    moved = apply(model.state_dict(), permutations, planted(permutations))
    assert any(not torch.equal(moved[key], tensor) for key, tensor in model.state_dict().items())
    model.load_state_dict(moved)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(("name", "residual"), [(n, False) for n in MODELS] + [(n, True) for n in RESIDUAL])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_planted_permutation_is_found_exactly(name: str, residual: bool, noise: float) -> None:
    """Shuffle a model (and disturb it a little): matching brings every unit back to where it was."""
    model = build(name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    permutations = permutations_of(model, residual=residual)
    hidden = planted(permutations)
    moved = apply({key: tensor + noise * torch.randn_like(tensor) for key, tensor in state.items()}, permutations, hidden)
    found = match(state, moved, permutations)
    for each in permutations:
        assert torch.equal(hidden[each.name][found.orders[each.name]], torch.arange(each.count)), each.name
    back = apply(moved, permutations, found.orders)
    if not noise:
        assert all(torch.equal(back[key], state[key]) for key in state)
        assert found.after == pytest.approx(1.0)
    assert found.before < 0.9 < found.after


def test_aligned_models_can_be_averaged() -> None:
    """Halfway between a model and its shuffled self nothing is left; after matching, the model itself."""
    model = build("bert")
    state, wanted = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    permutations = permutations_of(model)
    moved = apply(state, permutations, planted(permutations))
    aligned = apply(moved, permutations, match(state, moved, permutations).orders)
    errors = []
    for other in (moved, aligned):
        model.load_state_dict({key: (state[key] + other[key]) / 2 for key in state})
        errors.append(float((logits(model) - wanted).norm() / wanted.norm()))
    assert errors[1] < 1e-6 < 1e-2 < errors[0]


def test_independent_models_come_nearer() -> None:
    first, second = build("llama", 0), build("llama", 1)
    permutations = permutations_of(first, residual=True)
    found = match(first.state_dict(), second.state_dict(), permutations)
    assert found.after > found.before + 0.02  # the norms' ones are most of both
    again = match(first.state_dict(), second.state_dict(), permutations)
    assert all(torch.equal(again.orders[name], order) for name, order in found.orders.items()), "the same seed, the same result"
    second.load_state_dict(apply(second.state_dict(), permutations, found.orders))
    torch.testing.assert_close(logits(second), logits(build("llama", 1)), rtol=1e-4, atol=1e-5)


def test_models_of_one_base_stay_as_they_are() -> None:
    model = build("vit")
    state = model.state_dict()
    near = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in state.items()}
    found = match(state, near, permutations_of(model))
    assert all(torch.equal(order, torch.arange(len(order))) for order in found.orders.values())
    assert found.after == found.before
    assert found.sweeps == 1


def test_old_names_of_vit() -> None:
    """Checkpoints from before transformers 5."""
    prefix = "vit.encoder.layer.0."
    names = [f"attention.attention.{part}" for part in ("query", "key", "value")] + ["attention.output.dense"]
    shapes = {f"{prefix}{name}.weight": (8, 8) for name in names}
    shapes |= {f"{prefix}intermediate.dense.weight": (16, 8), f"{prefix}output.dense.weight": (8, 16)}
    found = find_permutations(shapes, {"num_attention_heads": 2})
    assert [(each.name, each.count) for each in found] == [(f"{prefix}mlp", 16), (f"{prefix}heads", 2)]
    assert Place(f"{prefix}attention.output.dense.weight", 1, 4) in found[1].places


@pytest.mark.parametrize(
    ("shapes", "config", "options", "message"),
    [
        ({"a.weight": (3, 3)}, {}, {}, r"no MLP or attention layer with a known name"),
        ({f"layers.0.self_attn.{p}_proj.weight": (8, 8) for p in "qkvo"}, {}, {}, r"has no `num_attention_heads`"),
        ({f"layers.0.self_attn.{p}_proj.weight": (8, 8) for p in "qkvo"}, {"num_attention_heads": 3}, {}, r"into 3 heads"),
        (
            {"norm.weight": (8,), "odd.weight": (8, 2)},
            {},
            {"residual": True},
            r"cannot tell .* odd.weight \(1 in all\)",
        ),
        ({"norm.weight": (8,), "embed_tokens.weight": (9, 4)}, {}, {"residual": True}, r"different sizes: \[4, 8\]"),
    ],
)
def test_what_cannot_be_permuted(shapes: Any, config: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_permutations(shapes, config, **options)


def test_models_of_different_shapes() -> None:
    permutation = Permutation("units", 3, (Place("w", 0),))
    with pytest.raises(ValueError, match=r"w must have one shape in both models to be aligned, got \(3, 2\) and none"):
        match({"w": torch.zeros(3, 2)}, {}, [permutation])
