"""What only PELA has: ranks of real architectures, layers that stay dense, calibration. The rest is in tests/contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_subspace import PelaConfig
from peft_subspace.adapters.pela import layer_ranks
from peft_subspace.base import Geometry
from tests.pico import LAYERS, MODELS, run

dense_is_fine = pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense")


def layers(model: Any) -> dict[str, Any]:
    return dict(model.base_model.named_subspace_layers())


def ranks(model: Any) -> dict[str, Any]:
    return {key: next(iter(layer.deltas("default").values())).ranks for key, layer in layers(model).items()}


# Ranks -------------------------------------------------------------------------------------------------------------------

VIT_BASE = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
VIT_LARGE = {"qkv": (3072, 1024), "proj": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}


def saved_by(shapes: dict[str, tuple[int, int]], blocks: int, ratio: float) -> int:
    config = PelaConfig(compression=ratio)
    total = 0
    for out, wide in shapes.values():
        (k,) = layer_ranks(Geometry("linear", (out, wide)), config) or (0,)
        assert k
        total += blocks * (out * wide - k * (out + wide))
    return total


@pytest.mark.parametrize(("ratio", "expected"), [(1.5, 58.20), (2.0, 44.08), (3.0, 29.87)])
def test_totals_of_deit_base(ratio: float, expected: float) -> None:
    """86.57 M with the official fused qkv, of which 12 blocks are compressed."""
    with torch.device("meta"):
        model = tf.ViTForImageClassification(tf.ViTConfig(num_labels=1000))
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e6, 2) == 86.57
    assert round((total - saved_by(VIT_BASE, 12, ratio)) / 1e6, 2) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(2.0, 153.23), (3.0, 103.00)])
def test_totals_of_deit_large(ratio: float, expected: float) -> None:
    """DeiT-III-L: 304.37 M, which is a ViT-L with two LayerScale vectors a block."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        model = tf.ViTForImageClassification(tf.ViTConfig(**sizes, num_labels=1000))
    total = sum(p.numel() for p in model.parameters()) + 24 * 2 * 1024
    # position embeddings do not include the class token there
    total -= 1024
    assert round(total / 1e6, 2) == 304.37
    assert round((total - saved_by(VIT_LARGE, 24, ratio)) / 1e6, 2) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(1.5, 62.16), (2.0, 49.29)])
def test_totals_of_swin_base(ratio: float, expected: float) -> None:
    """87.77 M; qkv, fc1 and fc2 of every block are compressed, attn.proj and the merging layers are not."""
    sizes = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    with torch.device("meta"):
        model = tf.SwinForImageClassification(tf.SwinConfig(**sizes, num_labels=1000))
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e6, 2) == 87.77
    for stage, depth in enumerate(sizes["depths"]):
        d = 128 * 2**stage
        total -= saved_by({"qkv": (3 * d, d), "fc1": (4 * d, d), "fc2": (d, 4 * d)}, depth, ratio)
    assert round(total / 1e6, 2) == expected


def test_everything_but_the_head_is_compressed_by_default() -> None:
    model = get_peft_model(MODELS["llama"].model(), PelaConfig())
    assert len(ranks(model)) == 14
    config = model.peft_config["default"]
    assert (config.compression, config.r, config.energy) == (2.0, None, None)
    linear = [m for n, m in MODELS["llama"].model().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    factors = sum(p.numel() for layer in layers(model).values() for p in layer.deltas("default")["pela_delta"].parameters())
    assert factors <= sum(m.weight.numel() for m in linear) / 2


def test_ranks_by_energy() -> None:
    base = MODELS["llama"].model()
    weight = base.model.layers[0].mlp.up_proj.weight
    model = get_peft_model(base, PelaConfig(energy=0.6, target_modules=["up_proj"]))
    squares = torch.linalg.svdvals(weight.double()).square()
    expected = int((squares.cumsum(0) < 0.6 * squares.sum()).sum()) + 1
    assert ranks(model)["model.layers.0.mlp.up_proj"] == (expected,)


@dense_is_fine
def test_one_budget_for_all_layers(tmp_path: Any) -> None:
    base = MODELS["llama"].model()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(4)  # worth more
    model = get_peft_model(copy.deepcopy(base), PelaConfig(compression=3.0, allocation="global"))
    found = ranks(model)
    total = sum(layer.get_base_layer().weight.numel() for layer in layers(model).values())
    used = sum(sum(p.numel() for p in layer.deltas("default")["pela_delta"].parameters()) for layer in layers(model).values())
    dense = [n for n in layers(get_peft_model(copy.deepcopy(base), PelaConfig())) if n not in found]
    used += sum(base.get_submodule(name).weight.numel() for name in dense)
    assert total * 0.9 / 3 <= used <= (total + sum(base.get_submodule(name).weight.numel() for name in dense)) / 3
    assert "model.layers.0.mlp.up_proj" in dense or found["model.layers.0.mlp.up_proj"] == (max(r[0] for r in found.values()),)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert ranks(loaded) == found
    batch = MODELS["llama"].batch()
    assert torch.equal(run(loaded, batch), run(model.eval(), batch))


def test_multiples() -> None:
    model = get_peft_model(MODELS["llama"].model(), PelaConfig(compression=1.5, multiple_of=4))
    assert {k for (k,) in ranks(model).values()} <= {4, 8}
    assert set(ranks(get_peft_model(MODELS["llama"].model(), PelaConfig(r=6, multiple_of=4))).values()) == {(4,)}


@dense_is_fine
def test_multiples_out_of_one_budget() -> None:
    """16 x 16 has its break-even at 8: with multiples of 4 its choices are 4 and, at 8, dense."""
    model = get_peft_model(MODELS["llama"].model(), PelaConfig(compression=2.0, allocation="global", multiple_of=4))
    found = ranks(model)
    base = MODELS["llama"].model()
    total = sum(m.weight.numel() for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    used = sum(k * sum(base.get_submodule(n).weight.shape) for n, (k,) in found.items())
    used += sum(m.weight.numel() for n, m in base.named_modules() if isinstance(m, nn.Linear) and n not in (*found, "lm_head"))
    assert {k for (k,) in found.values()} <= {4, 8}
    assert 0.85 * total / 2 <= used <= total / 2
    with pytest.warns(UserWarning, match=r"compress these layers \d\.\d+ times, not 100"):
        get_peft_model(MODELS["llama"].model(), PelaConfig(compression=100, allocation="global"))


# What stays dense --------------------------------------------------------------------------------------------------------


def test_layers_that_no_rank_makes_smaller_stay_dense() -> None:
    with pytest.warns(UserWarning, match=r"leaves 1 of 4 layers dense.*depthwise"):
        model = get_peft_model(MODELS["conv"].model(), PelaConfig(r=2, **MODELS["conv"].targets))
    assert sorted(layers(model)) == ["grouped", "pointwise", "stem"]
    assert isinstance(model.get_base_model().depthwise, nn.Conv2d)
    assert sorted(model.peft_config["default"].target_modules) == ["grouped", "pointwise", "stem"]


def test_nothing_to_compress_is_an_error_and_changes_nothing() -> None:
    base = MODELS["mlp"].model()
    before = run(base, MODELS["mlp"].batch())
    with pytest.raises(ValueError, match=r"No layer would get smaller: \['first'\].*Lower `r`"):
        get_peft_model(base, PelaConfig(r=8, target_modules=["first"]))
    assert torch.equal(run(base, MODELS["mlp"].batch()), before)


def test_linear_layers_with_few_outputs_stay_dense() -> None:
    with pytest.warns(UserWarning, match="head"):
        model = get_peft_model(MODELS["mlp"].model(), PelaConfig(target_modules=["first", "head"]))
    assert list(layers(model)) == ["first"]
    model = get_peft_model(MODELS["mlp"].model(), PelaConfig(target_modules=["first", "head"], min_features=4))
    assert sorted(layers(model)) == ["first", "head"]


# Factors -----------------------------------------------------------------------------------------------------------------


def test_the_start_is_the_truncated_svd() -> None:
    base = LAYERS["linear"].model()
    weight = base.layer.weight.double()
    model = get_peft_model(base, PelaConfig(r=2, target_modules=["layer"]))
    layer = layers(model)["layer"]
    left, values, right = torch.linalg.svd(weight)
    expected = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(weight + layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6)
    assert float(layer.get_delta_weight("default").detach().norm()) == pytest.approx(float(values[2:].norm()), rel=1e-5)


def correlated(model: Any) -> list[dict[str, Tensor]]:
    """Inputs that live in three directions, and away from zero."""
    torch.manual_seed(4)
    mix = torch.randn(3, 8)
    return [{"x": torch.randn(16, 3) @ mix + 2.0} for _ in range(3)]


def test_calibration_serves_the_inputs() -> None:
    base = MODELS["mlp"].model()
    model = get_peft_model(copy.deepcopy(base), PelaConfig(r=3, target_modules=["first"]))
    batches = correlated(model)

    def error() -> float:
        return sum(float((layer(b["x"]) - base.first(b["x"])).detach().square().mean()) for b in batches)

    layer = layers(model)["first"]
    plain = error()
    training = {module: module.training for module in model.modules()}
    model.calibrate(batches)
    assert {module: module.training for module in model.modules()} == training
    assert error() < 1e-6 * plain, "three directions and a mean: rank 3 and a bias hold all of it"
    assert model.peft_config["default"].activation_weighted
    first = layer.deltas("default")["pela_delta"]
    x = torch.cat([b["x"] for b in batches]).double()
    weight = base.first.weight.double()
    lost = (weight - first.product().double()) @ x.mean(0)
    torch.testing.assert_close(first.bias.double(), lost, rtol=1e-4, atol=1e-6)


def test_calibration_leaves_padding_out() -> None:
    pico = MODELS["bert"]
    model = get_peft_model(pico.model(), PelaConfig(r=4, **pico.targets))
    ids = pico.batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    junk = ids.clone()
    junk[:, 4:] = 7
    results = []
    for tokens in (ids, junk):
        model.calibrate([{"input_ids": tokens, "attention_mask": mask}])
        results.append({key: value.clone() for key, value in model.state_dict().items() if "pela_delta" in key})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key].abs(), value.abs(), rtol=1e-3, atol=1e-5)  # signs of a pair are free


@dense_is_fine
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["conv", "gpt2", "llama, tied", "t5", "vit", "moe"])
@pytest.mark.parametrize("layers_at_once", [None, 1])
def test_calibration_of_every_kind_of_layer(name: str, layers_at_once: int | None) -> None:
    """Nearer to the base, on the inputs that it was made with, than the plain truncation; the same in groups of layers."""
    pico = MODELS[name]
    base, batch = pico.model(), pico.batch()
    model = get_peft_model(copy.deepcopy(base), PelaConfig(r=2, **pico.targets))
    key, layer = next((k, m) for k, m in layers(model).items() if not next(iter(m.geometries.values()))[1].reads_own_weight)
    seen: list[Tensor] = []
    handle = model.get_base_model().get_submodule(key).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with model.disable_adapter():
        run(model, batch)
    handle.remove()

    def error() -> float:
        with torch.no_grad():
            return float((layer(seen[0]) - layer.base_layer(seen[0])).square().mean())

    before = error()
    model.calibrate([batch], layers_at_once=layers_at_once)
    assert error() < before


def test_calibration_needs_batches_that_reach_the_layers() -> None:
    model = get_peft_model(MODELS["mlp"].model(), PelaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="No batches"):
        model.calibrate([])
    with pytest.raises(ValueError, match=r"\['first'\]: no batch reached"):
        model.calibrate([MODELS["mlp"].batch()], forward=lambda model, batch: None)


def test_calibration_leaves_switches_alone() -> None:
    model = get_peft_model(MODELS["mlp"].model(), PelaConfig(r=2, target_modules=["first"]))
    model.base_model.disable_adapter_layers()
    model.requires_grad_(False)
    model.calibrate([MODELS["mlp"].batch()])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.disable_adapters for layer in layers(model).values())
    with pytest.warns(UserWarning, match=r"in force after `model.calibrate\(batches\)` only"):
        get_peft_model(MODELS["mlp"].model(), PelaConfig(r=2, target_modules=["first"], activation_weighted=True))


def test_a_config_decides_anew_for_another_model() -> None:
    config = PelaConfig(energy=0.5, target_modules=["up_proj"])
    first = ranks(get_peft_model(MODELS["llama"].model(), config))
    simple = MODELS["llama"].model()
    with torch.no_grad():
        for layer in simple.model.layers:
            layer.mlp.up_proj.weight.copy_(torch.randn(32, 1) @ torch.randn(1, 16))
    assert set(first.values()) != {(1,)}
    assert set(ranks(get_peft_model(simple, config)).values()) == {(1,)}
    assert (
        ranks(get_peft_model(MODELS["llama"].model(), PelaConfig(energy=0.5, inference_mode=True, target_modules=["up_proj"])))
        == first
    )


def test_norms_are_trained_in_copies() -> None:
    pico = MODELS["bert"]
    base, batch = run(pico.model(), pico.batch()), pico.batch()
    model = get_peft_model(pico.model(), PelaConfig(r=2, train_norms=True, **pico.targets))
    norms = [n for n, p in model.named_parameters() if "LayerNorm" in n and p.requires_grad]
    assert len(norms) == 10  # five norms of two parameters
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in norms:
                parameter.mul_(2)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), base)


# Wrong arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2, "compression": 2.0}, "compression=2.0 and r=2: each of them sets the ranks"),
        ({"compression": 1.0}, "compression=1.0.*a number above 1"),
        ({"compression": True}, "compression=True"),
        ({"r": 0}, "r=0: `r` should be a positive integer"),
        ({"r": [2, 3, 4]}, r"r=\[2, 3, 4\]"),
        ({"rank_pattern": {"a": -1}}, "a=-1"),
        ({"energy": 1.5}, r"energy=1.5.*\(0, 1\]"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"svd": "qr"}, "svd='qr' is not known. Accepted: 'gram', 'full', 'lowrank'"),
        ({"allocation": "fair"}, "allocation='fair'"),
        ({"r": 4, "allocation": "global"}, "allocation='global' shares out"),
        ({"ratio": 2}, "ratio"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PelaConfig(**fields)


def test_no_lora_export() -> None:
    from peft_subspace import to_lora

    model = get_peft_model(MODELS["mlp"].model(), PelaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match=r"first.weight: cannot be exported to LoRA: its update has no exact LoRA form"):
        to_lora(model)
