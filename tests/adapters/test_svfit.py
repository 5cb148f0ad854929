"""What SVFit promises beside the contract: oracles, its config, bases that are shared, saved, made again or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.portability import to_int8, to_nf4
from peft_subspace import SvfitConfig, SvfitDelta, SvfitModel
from peft_subspace.base.geometry import describe
from peft_subspace.functional import svd
from tests.pico import LAYERS, MODELS, Pico, run, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def adapt(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    pico = (MODELS | LAYERS)[name]
    torch.manual_seed(3)
    model = get_peft_model(pico.model(dtype), SvfitConfig(**{"init_weights": False, **pico.targets, **fields}))
    return model.eval(), pico.batch(dtype)


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, SvfitDelta]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SvfitDelta) and name.endswith(f".{adapter}")
    }


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that were decomposed."""
    done: list[tuple[int, ...]] = []
    original = svd.leading_singular

    def counted(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        done.append(tuple(matrix.shape))
        return original(matrix, *args, **kwargs)

    monkeypatch.setattr(svd, "leading_singular", counted)
    return done


class Wide(nn.Module):
    """Layers as wide as rounding needs to matter: Gaussian weights have no gap in their spectrum."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


WIDE = Pico(Wide, lambda: {"x": torch.randn(8, 96)}, {"target_modules": ["first", "second"]})


# Oracles -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "linear, no bias"])
@pytest.mark.parametrize("r", [2, 6])
def test_psoft_with_only_its_scale_trained_is_svfit(name: str, r: int) -> None:
    """PSOFT is W + s B (R - I) A; without rotation and with `vector_a` alone this is U diag(s (a - 1)) V^T, so z = a - 1.

    1e-4 of the update: PSOFT decomposes in float32.
    """
    pico = LAYERS[name]
    batch = pico.batch()
    psoft: Any = get_peft_model(pico.model(), PsoftConfig(r=r, psoft_alpha=r, target_modules=["layer"]))
    rotation = psoft.get_base_model().layer.psoft_R["default"]
    z = 0.3 * torch.randn(r)
    with torch.no_grad():
        rotation.vector_a.copy_(1 + z)
    model, _ = adapt(name, r=r, scale="relative", init_weights=True, save_basis=False)
    (delta,) = deltas(model).values()
    with torch.no_grad():
        delta.shift.copy_(z)
    base = run(pico.model(), batch)
    update, oracle = run(model, batch) - base, run(psoft, batch) - base
    assert float((update - oracle).norm() / oracle.norm()) < 1e-4


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("router", "experts")])
@pytest.mark.parametrize("svd_method", ["gram", "full"])
def test_the_papers_split_is_the_same_map(name: str, svd_method: Any) -> None:
    """dW against the literal W_e + U diag(s + delta) V^T of the paper in float64, matrix by matrix."""
    model, _ = adapt(name, r=2, svd=svd_method, save_basis=False)
    layer = model.get_base_model().layer
    ((container, (_, geometry)),) = layer.geometries.items()
    delta = layer.deltas("default")[container]
    weight = geometry.canonical(layer.get_base_layer().weight.data).double().reshape(*delta.stack, delta.rows, delta.columns)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    r = delta.r
    rest = weight - (left[..., :r] * values[..., None, :r]) @ right[..., :r, :]
    sigma = values[..., :r] + delta.shift.detach().double()
    expected = rest + (left[..., :r] * sigma[..., None, :]) @ right[..., :r, :]
    found = weight + layer.dense_update(container, "default").detach().double().reshape(weight.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float((expected - weight).abs().max()))


def test_a_convolution_with_groups_is_decomposed_group_by_group() -> None:
    model, _ = adapt("conv, groups", r="full", init_weights=True)
    (delta,) = deltas(model).values()
    weight = model.get_base_model().layer.get_base_layer().weight.data
    for group in range(2):
        values = torch.linalg.svdvals(weight[4 * group : 4 * group + 4].flatten(1).double())
        torch.testing.assert_close(delta.singular_values[group].double(), values, rtol=1e-5, atol=1e-6)


def test_scaling_every_value_scales_the_weight() -> None:
    model, _ = adapt("linear", r="full", scale="relative", init_weights=True, save_basis=False)
    layer = model.get_base_model().layer
    with torch.no_grad():
        layer.svfit_delta["default"].shift.fill_(0.5)
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), 0.5 * layer.get_base_layer().weight.data)


def test_relative_and_additive_are_one_map() -> None:
    """z = delta / s."""
    additive, batch = adapt("llama", r=3)
    relative, _ = adapt("llama", r=3, scale="relative")
    with torch.no_grad():
        for mine, theirs in zip(deltas(relative).values(), deltas(additive).values(), strict=True):
            mine.shift.copy_(theirs.shift / theirs.singular_values)
    torch.testing.assert_close(run(relative, batch), run(additive, batch), rtol=1e-5, atol=1e-5)


def test_nonnegative_stops_at_zero() -> None:
    model, _ = adapt("linear", r=2, nonnegative=True)
    layer = model.get_base_model().layer
    delta = layer.svfit_delta["default"]
    with torch.no_grad():
        delta.shift.copy_(torch.stack([-2 * delta.singular_values[0], 0.5 * delta.singular_values[1]]))
    values = torch.linalg.svdvals((layer.get_base_layer().weight + layer.get_delta_weight("default")).detach())
    assert float(values[-1]) < 1e-3, "one value is zero, none is negative"  # the basis is float16
    layer(torch.randn(3, 8)).sum().backward()
    assert delta.shift.grad is not None
    assert delta.shift.grad[0] == 0
    assert delta.shift.grad[1] != 0


@pytest.mark.parametrize("form", ["one-sided", "built", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_in_a_model(form: str, dtype: torch.dtype) -> None:
    """Forms against one-sided float32: outputs and gradients; start at the base to the bit."""
    results = {}
    for chosen in ("one-sided", form):
        model = get_peft_model(WIDE.model(dtype), SvfitConfig(r="full", form=chosen, save_basis=False, **WIDE.targets))
        batch = WIDE.batch(dtype)
        assert torch.equal(run(model, batch), run(WIDE.model(dtype), batch))
        with torch.no_grad():
            for delta in deltas(model).values():
                delta.shift.copy_(0.3 * delta.singular_values * torch.linspace(-1, 1, delta.r))
        y = model(**batch)
        y.float().square().sum().backward()
        results[chosen] = [y.detach().float(), *(delta.shift.grad for delta in deltas(model).values())]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2  # bfloat16: some ten roundings of 2^-9 through two layers
    for found, expected in zip(results[form], results["one-sided"], strict=True):
        assert found is not None
        assert expected is not None
        assert float((found - expected).norm() / expected.norm()) < tolerance


def test_a_full_basis_is_used_in_place_of_the_weight_once_it_has_moved() -> None:
    """The factored form: exact at the start, where it is the base that is called, and without the base afterwards."""
    model = get_peft_model(WIDE.model(), SvfitConfig(r="full", **WIDE.targets))
    calls: list[Any] = []
    for layer in ("first", "second"):
        model.get_submodule(f"base_model.model.{layer}").base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(**WIDE.batch())
    assert len(calls) == 2
    train(model, WIDE.batch(), steps=2)
    calls.clear()
    model(**WIDE.batch())
    assert not calls
    assert get_peft_model(WIDE.model(torch.bfloat16), SvfitConfig(r="full", **WIDE.targets)) is not None
    for delta in deltas(get_peft_model(WIDE.model(torch.bfloat16), SvfitConfig(r="full", **WIDE.targets))).values():
        assert delta.counterpart is None, "in bfloat16 the factors would not be the weight"


# Ranks -------------------------------------------------------------------------------------------------------------------


class Spectrum(nn.Module):
    """A linear layer with these singular values."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        k = len(values)
        left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (k, k + 2))
        self.layer = nn.Linear(k + 2, k)
        self.layer.weight.data = (left * torch.tensor(values)) @ right[:k]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("values", "fields", "r"),
    [
        ([3.0, 2.0, 1.0, 0.5], {"energy": 0.6}, 1),
        ([3.0, 2.0, 1.0, 0.5], {"energy": 0.9}, 2),
        ([3.0, 2.0, 1.0, 0.5], {"energy": 0.99, "max_r": 3}, 3),
        ([1.0, 1.0, 1.0, 1.0], {"energy": 0.5001}, 3),  # ties
        ([2.0, 1.0, 0.0, 0.0], {"energy": 0.999999}, 2),  # a tail of zeros
        ([3.0, 2.0, 1.0, 0.5], {"r": 100}, 4),  # lowered to what there is
        ([3.0, 2.0, 1.0, 0.5], {"r": "full"}, 4),
        ([3.0, 2.0, 1.0, 0.5], {}, 4),
    ],
)
def test_ranks(values: list[float], fields: dict[str, Any], r: int, tmp_path: Path, decompositions: list[Any]) -> None:
    torch.manual_seed(0)
    base = Spectrum(values)
    model = get_peft_model(copy.deepcopy(base), SvfitConfig(target_modules=["layer"], init_weights=False, **fields))
    (delta,) = deltas(model).values()
    assert delta.r == r
    assert model.peft_config["default"].rank_pattern == ({"layer": r} if "energy" in fields else {})
    torch.testing.assert_close(delta.singular_values, torch.tensor(values[:r]), rtol=1e-4, atol=1e-4)
    model.save_pretrained(str(tmp_path))
    decompositions.clear()
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    x = torch.randn(3, len(values) + 2)
    assert torch.equal(loaded(x), model(x))
    assert len(decompositions) == (not model.peft_config["default"].save_basis)


def test_ranks_by_energy_are_those_of_each_layer() -> None:
    """A recorded name must not decide for a layer whose name ends alike."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.sub = Spectrum([9.0, 0.1, 0.1]).layer, Spectrum([1.0, 1.0, 1.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.sub(x)

    model = get_peft_model(Nested(), SvfitConfig(energy=0.9, target_modules=["layer"]))
    assert model.peft_config["default"].rank_pattern == {"layer": 1, "sub.layer": 3}


def test_directions_that_a_weight_does_not_have_do_nothing() -> None:
    base = Spectrum([2.0, 1.0, 0.0, 0.0])
    model = get_peft_model(copy.deepcopy(base), SvfitConfig(r="full", target_modules=["layer"]))
    (delta,) = deltas(model).values()
    with torch.no_grad():
        delta.shift[2:] = 5.0
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    model(x).square().sum().backward()
    assert torch.isfinite(delta.shift.grad).all()  # type: ignore[arg-type]


def test_a_weight_of_zeros_stays_zero(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 4))
    nn.init.zeros_(base[0].weight)
    for save_basis in (True, False):
        model = get_peft_model(copy.deepcopy(base), SvfitConfig(r=2, target_modules=["0"], save_basis=save_basis))
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        assert torch.equal(loaded(torch.ones(1, 6)), base(torch.ones(1, 6)))


# The basis: shared, saved, made again ----------------------------------------------------------------------------------------


def test_an_embedding_is_decomposed_through_its_small_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("an SVD of the whole table"))
    sizes: list[int] = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (sizes.append(matrix.shape[-1]), original(matrix))[1])
    model, _ = adapt("embedding", svd="full", r=4)
    (delta,) = deltas(model).values()
    assert sizes == [8]
    assert delta.basis.shape == (4, 8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "conv", "moe", "bert"])
def test_only_the_smaller_side_is_kept(name: str) -> None:
    model, _ = adapt(name, r=2)
    for delta in deltas(model).values():
        one_side = delta.geometry.kind in ("conv", "embedding")
        assert delta.basis.shape[-1] == (delta.rows if one_side else min(delta.rows, delta.columns))


@pytest.mark.parametrize("name", ["llama", "mha", "conv"])
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (3, 3)])
def test_adapters_of_one_weight_share_its_basis(name: str, first: int, second: int, decompositions: list[Any]) -> None:
    model, batch = adapt(name, r=first)
    before, alone = len(decompositions), run(model, batch)
    model.add_adapter("other", SvfitConfig(r=second, init_weights=False, **MODELS[name].targets))
    mine, theirs = deltas(model).values(), deltas(model, "other").values()
    for a, b in zip(mine, theirs, strict=True):
        if not a.stack:
            assert a.basis.untyped_storage().data_ptr() == b.basis.untyped_storage().data_ptr()
        assert torch.equal(a.basis[..., : min(a.r, b.r), :], b.basis[..., : min(a.r, b.r), :])
    if second <= first:
        assert len(decompositions) == before
    assert torch.equal(run(model, batch), alone)


def test_a_file_for_an_adapter_that_is_there_changes_no_other(tmp_path: Path) -> None:
    """Both look along one basis; the file has another."""
    other_base, _ = adapt("llama", r=3)
    for delta in deltas(other_base).values():
        delta.basis = -delta.basis
    other_base.save_pretrained(str(tmp_path))
    model, batch = adapt("llama", r=3)
    model.add_adapter("second", SvfitConfig(r=3, init_weights=False, **MODELS["llama"].targets))
    model.set_adapter("second")
    before = run(model, batch)
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(run(model, batch), before)
    model.set_adapter("default")
    assert torch.equal(run(model, batch), run(other_base, batch))


def test_a_file_of_another_base_is_not_loaded_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    torch.manual_seed(3)
    fields = {"r": 3, "save_basis": False, "init_weights": False, **MODELS["llama"].targets}
    elsewhere = get_peft_model(MODELS["llama"].model(seed=8), SvfitConfig(**fields))
    elsewhere.save_pretrained(str(tmp_path))
    model, batch = adapt("llama", r=3, save_basis=False)
    before = run(model, batch)
    with pytest.raises(ValueError, match="other bits"):
        model.load_adapter(str(tmp_path), "default")
    assert torch.equal(run(model, batch), before)


@pytest.mark.parametrize("ranks", [(4, 2), (3, 3), (2, 4)])
def test_accelerate_saves_the_state_of_adapters_that_share(ranks: tuple[int, int], tmp_path: Path) -> None:
    """A safetensors file knows no two views of one storage."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for name in ("llama", "moe"):
        models = []
        for _ in range(2):
            model, batch = adapt(name, r=ranks[0])
            model.add_adapter("second", SvfitConfig(r=ranks[1], init_weights=False, **MODELS[name].targets))
            models.append(accelerator.prepare(model))
            accelerator._models.clear()
        first, second = models
        train(first, batch)
        accelerator._models.append(first)
        accelerator.save_state(str(tmp_path / name))
        accelerator._models[:] = [second]
        accelerator.load_state(str(tmp_path / name))
        accelerator._models.clear()
        for adapter in ("default", "second"):
            first.set_adapter(adapter)
            second.set_adapter(adapter)
            assert torch.equal(run(second, batch), run(first, batch))


def test_adapters_of_different_kinds_do_not_share() -> None:
    model, _ = adapt("mlp", r=3)
    model.add_adapter("other", SvfitConfig(r=3, svd="lowrank", seed=5, **MODELS["mlp"].targets))
    for a, b in zip(deltas(model).values(), deltas(model, "other").values(), strict=True):
        assert a.basis.data_ptr() != b.basis.data_ptr()
    with pytest.raises(ValueError, match="different bases"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_a_shared_basis_is_saved_whole(tmp_path: Path) -> None:
    for name in ("llama", "moe"):
        model, batch = adapt(name, r=4)
        model.add_adapter("other", SvfitConfig(r=2, init_weights=False, **MODELS[name].targets))
        model.set_adapter("other")
        model.save_pretrained(str(tmp_path / name))
        loaded = PeftModel.from_pretrained(MODELS[name].model(), str(tmp_path / name / "other"))
        assert torch.equal(run(loaded, batch), run(model, batch))
        assert (tmp_path / name / "other/adapter_model.safetensors").stat().st_size < (
            tmp_path / name / "adapter_model.safetensors"
        ).stat().st_size


@pytest.mark.parametrize("transformers", [False, True])
@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.parametrize("trainable", [False, True])
def test_loading_decomposes_only_what_the_file_leaves_out(
    transformers: bool, save_basis: bool, trainable: bool, tmp_path: Path, decompositions: list[Any]
) -> None:
    model, batch = adapt("llama", r=3, save_basis=save_basis)
    model.save_pretrained(str(tmp_path))
    decompositions.clear()
    loaded: Any = MODELS["llama"].model()
    if transformers:
        loaded.load_adapter(str(tmp_path), is_trainable=trainable)
        assert not decompositions, "not before the first use: transformers fills the tensors by itself"
    else:
        loaded = PeftModel.from_pretrained(loaded, str(tmp_path), is_trainable=trainable)
        assert len(decompositions) == (0 if save_basis else 14)
    assert torch.equal(run(loaded.eval(), batch), run(model, batch))
    assert len(decompositions) == (0 if save_basis else 14)
    run(loaded, batch)
    assert len(decompositions) == (0 if save_basis else 14), "once"


def test_a_second_adapter_from_a_file_looks_along(tmp_path: Path, decompositions: list[Any]) -> None:
    model, batch = adapt("llama", r=3, save_basis=False)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path))
    decompositions.clear()
    loaded.load_adapter(str(tmp_path), "again")
    loaded.set_adapter("again")
    assert torch.equal(run(loaded, batch), run(model, batch))
    assert not decompositions


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 4}, True),
        ({"energy": 0.5}, True),
        ({"r": "full"}, False),
        ({"r": "full", "svd": "lowrank"}, True),
        ({"r": 4, "save_basis": False}, False),
        ({"r": "full", "save_basis": True}, True),
    ],
)
def test_what_auto_saves(fields: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    model, _ = adapt("llama", **fields)
    assert model.peft_config["default"].save_basis is expected
    model.save_pretrained(str(tmp_path))
    found = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in found}
    assert kinds == {"shift", "singular_values", "probe"} | ({"basis"} if expected else set())
    assert {tensor.dtype for key, tensor in found.items() if key.endswith("basis")} <= {torch.float16}


def test_auto_leaves_large_bases_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_subspace.adapters import svfit

    monkeypatch.setattr(svfit, "SMALL", 2 * 14 * 3 * 16 - 1)  # llama: 14 layers of 3 directions of 16 numbers
    assert adapt("llama", r=3)[0].peft_config["default"].save_basis is False
    monkeypatch.setattr(svfit, "SMALL", 2 * 14 * 3 * 16)
    assert adapt("llama", r=3)[0].peft_config["default"].save_basis is True


def test_a_file_without_the_basis_is_small(tmp_path: Path) -> None:
    """Three float32 numbers for each direction, beside the header."""
    model = get_peft_model(WIDE.model(), SvfitConfig(r="full", **WIDE.targets))
    model.save_pretrained(str(tmp_path))
    header = int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == 8 + header + 12 * sum(d.r for d in deltas(model).values())


def rounded(convert: Callable[[Tensor], Tensor]) -> nn.Module:
    base = WIDE.model()
    with torch.no_grad():
        for layer in (base.first, base.second):
            layer.weight.copy_(convert(layer.weight))
    return base


BASES: dict[str, Callable[[], nn.Module]] = {
    "bfloat16": lambda: WIDE.model(torch.bfloat16),
    "rounded to bfloat16": lambda: rounded(lambda w: w.bfloat16().float()),
    "int8": lambda: rounded(to_int8),
    "nf4": lambda: rounded(to_nf4),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("r", [16, "full"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_base_with_other_bits_is_refused_or_the_file_has_the_basis(
    base: str, r: Any, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = get_peft_model(WIDE.model(), SvfitConfig(r=r, save_basis=False, init_weights=False, **WIDE.targets)).eval()
    model.save_pretrained(str(tmp_path / "without"))
    model.base_model.keep_basis()
    model.save_pretrained(str(tmp_path / "with"))
    other = BASES[base]()
    keys, before = set(other.state_dict()), [type(module) for module in other.modules()]
    with pytest.raises(ValueError, match=r"first\.weight.*other bits.*keep_basis.*left as it was") as caught:
        PeftModel.from_pretrained(other, str(tmp_path / "without"), low_cpu_mem_usage=low_cpu_mem_usage)
    assert str(other.first.weight.dtype) in str(caught.value)
    assert set(other.state_dict()) == keys
    assert [type(module) for module in other.modules()] == before
    loaded = PeftModel.from_pretrained(other, str(tmp_path / "with"), low_cpu_mem_usage=low_cpu_mem_usage)
    for mine, theirs in zip(deltas(loaded).values(), deltas(model).values(), strict=True):
        assert torch.equal(mine.basis, theirs.basis)
    dtype = other.first.weight.dtype
    with torch.no_grad():  # W (I + V z V^T) of that very base: the adapter is the same one, whatever W is
        layer, weight = loaded.get_base_model().first, other.first.get_base_layer().weight.double()
        delta = layer.svfit_delta["default"]
        rows = delta.basis.double()
        expected = weight @ rows.T @ torch.diag(delta.relative().double()) @ rows
    found = layer.get_delta_weight("default").detach().double()
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_the_same_bits_in_another_dtype_are_the_same_base(tmp_path: Path) -> None:
    """bfloat16 weights that were widened to float32: nothing was lost, so nothing is refused."""
    narrow = WIDE.model(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(narrow), SvfitConfig(r="full", init_weights=False, **WIDE.targets))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(narrow).float(), str(tmp_path))
    for mine, theirs in zip(deltas(loaded).values(), deltas(model).values(), strict=True):
        torch.testing.assert_close(mine.relative(), theirs.relative())


def test_transformers_loader_refuses_another_base_at_the_first_use(tmp_path: Path) -> None:
    model, batch = adapt("llama", r=3, save_basis=False)
    model.save_pretrained(str(tmp_path))
    other: Any = MODELS["llama"].model(seed=7)
    other.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match=r"q_proj\.weight: the adapter was trained on a base with other bits"):
        run(other, batch)


def test_an_adapter_put_on_a_meta_base_waits_for_its_weights() -> None:
    pico = MODELS["llama"]
    base = pico.model()
    expected = run(base, pico.batch())
    with torch.device("meta"):
        empty = pico.build().eval().requires_grad_(False)
    model = get_peft_model(empty, SvfitConfig(r=3, **pico.targets), low_cpu_mem_usage=True)
    assert all(delta.is_incomplete() for delta in deltas(model).values())
    model.get_base_model().to_empty(device="cpu")
    for name, value in base.state_dict().items():
        found = [key for key in model.state_dict() if key.replace(".base_layer", "") == f"base_model.model.{name}"]
        owner, _, last = found[0].rpartition(".")
        getattr(model.get_submodule(owner), last).data.copy_(value)
    for name, buffer in base.named_buffers():
        model.get_base_model().get_buffer(name).copy_(buffer)
    with torch.no_grad():
        for delta in deltas(model).values():
            for tensor in (delta.shift, delta.singular_values, delta.probe, delta.basis):
                tensor.zero_()
    assert torch.equal(run(model, pico.batch()), expected)
    assert not any(delta.is_incomplete() for delta in deltas(model).values())
    losses = train(model, pico.batch())
    assert losses[-1] < losses[0]


def test_energy_on_a_meta_base_is_bounded_by_the_full_rank() -> None:
    with torch.device("meta"):
        empty = MODELS["mlp"].build()
    model = get_peft_model(empty, SvfitConfig(energy=0.5, **MODELS["mlp"].targets), low_cpu_mem_usage=True)
    assert [delta.r for delta in deltas(model).values()] == [8, 16]


def test_keep_basis_goes_both_ways(tmp_path: Path, decompositions: list[Any]) -> None:
    model, batch = adapt("llama", r=3, save_basis=False)
    tuner: SvfitModel = model.base_model
    tuner.keep_basis()
    model.save_pretrained(str(tmp_path / "with"))
    decompositions.clear()
    loaded = PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path / "with"))
    assert torch.equal(run(loaded, batch), run(model, batch))
    assert not decompositions
    loaded.base_model.keep_basis(keep=False)
    loaded.save_pretrained(str(tmp_path / "without"))
    assert not any("basis" in key for key in load_file(tmp_path / "without/adapter_model.safetensors"))
    again = PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path / "without"))
    torch.testing.assert_close(run(again, batch), run(model, batch))
    lowrank, _ = adapt("mlp", r=2, svd="lowrank")
    with pytest.raises(ValueError, match="must be in the file"):
        lowrank.base_model.keep_basis(keep=False)


def test_a_damaged_probe_is_noticed(tmp_path: Path) -> None:
    model, _ = adapt("llama", r=3, save_basis=False)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("probe"))
    save_file({**tensors, key: tensors[key] + 0.1}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the singular vectors have turned"):
        PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path))


# With the machinery around it ------------------------------------------------------------------------------------------------


def test_ddp_is_told_to_leave_the_bases_alone() -> None:
    model, _ = adapt("llama", r=3)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    buffers = {name for name, _ in model.named_buffers() if ".svfit_" in name}
    assert len(buffers) == 42
    assert buffers <= ignored
    assert not any(name in ignored for name, parameter in model.named_parameters())
    plain: Any = MODELS["llama"].model()
    plain.add_adapter(SvfitConfig(r=3, **MODELS["llama"].targets))
    assert {name for name, _ in plain.named_buffers() if ".svfit_" in name} <= set(plain._ddp_params_and_buffers_to_ignore)


@pytest.mark.parametrize("bias", ["all", "svfit_only"])
@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_biases_are_trained_and_saved(name: str, bias: Any, tmp_path: Path) -> None:
    pico = MODELS[name]
    model = get_peft_model(pico.model(), SvfitConfig(r=2, bias=bias, **pico.targets))
    before = {key: p.clone() for key, p in model.named_parameters() if key.endswith("bias")}
    train(model, pico.batch())
    moved = {key for key, p in model.named_parameters() if key in before and not torch.equal(p, before[key])}
    chosen = {key for key in before if bias == "all" or "base_layer" in key or "modules_to_save" in key}
    assert moved == {key for key in chosen if not key.endswith("original_module.bias")}
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path))
    assert torch.equal(run(loaded, pico.batch()), run(model, pico.batch()))


def test_gradients_of_a_trained_bias_are_right() -> None:
    """The output side takes the bias off before it scales, so it goes both ways there."""
    for name in ("linear", "conv2d", "conv, groups"):
        model, batch = adapt(name, torch.float64, r=2, bias="all")
        model.double()
        layer = model.get_base_model().layer
        grad = torch.autograd.grad(layer(batch["x"]).sum(), layer.base_layer.bias)[0]
        outputs = layer(batch["x"])
        torch.testing.assert_close(grad, torch.full_like(grad, outputs[:, 0].numel()))


def test_numbers_stay_float32_and_bases_are_narrow_on_a_narrow_base() -> None:
    for fields, dtype in (
        ({"r": 3}, torch.float16),
        ({"r": "full"}, torch.bfloat16),
        ({"r": 3, "basis_dtype": "float32"}, torch.float32),
    ):
        model, _ = adapt("llama", torch.bfloat16, **fields)
        for delta in deltas(model).values():
            assert {delta.shift.dtype, delta.singular_values.dtype, delta.probe.dtype} == {torch.float32}
            assert delta.basis.dtype == dtype


def test_quantised_layers_are_recognised_by_their_geometry() -> None:
    assert not describe(nn.Linear(4, 3))["weight"].quantized


# Configs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0: `r` should be a positive integer value or 'full'"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": "all"}, "r='all'"),
        ({"rank_pattern": {"q": -1}}, "q=-1"),
        ({"r": 4, "energy": 0.9}, "give one of them"),
        ({"energy": 1.5}, r"energy=1.5.*\(0, 1\]"),
        ({"max_r": 8}, "set `energy`"),
        ({"max_r": 0, "energy": 0.5}, "max_r=0"),
        ({"svd": "fast"}, "svd='fast'.*'gram', 'full', 'lowrank'"),
        ({"svd_niter": 0}, "svd_niter=0"),
        ({"scale": "log"}, "scale='log'.*'additive', 'relative'"),
        ({"save_basis": "yes"}, "save_basis='yes'.*'auto', True, False"),
        ({"basis_dtype": "int8"}, "basis_dtype='int8'"),
        ({"form": "dense"}, "form='dense'.*'one-sided', 'built', 'factored'"),
        ({"bias": "lora_only"}, "bias='lora_only'.*'svfit_only'"),
        ({"svd": "lowrank", "save_basis": False}, "must be in the file"),
        ({"svd": "lowrank", "energy": 0.9}, "energy"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SvfitConfig(**fields)


# What may happen to a model with an adapter ----------------------------------------------------------------------------------


def assert_is_its_dense_self(model: Any, batch: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """What the model computes is what it computes with its adapter merged."""
    found = run(model, batch).double()
    model.merge_adapter()
    merged = run(model, batch).double()
    model.unmerge_adapter()
    assert float((found - merged).norm() / merged.norm()) < tolerance


@pytest.mark.parametrize("fields", [{"r": "full"}, {"r": 16, "save_basis": False}, {"r": 16}])
def test_a_whole_state_brings_its_own_base(fields: dict[str, Any]) -> None:
    """`load_state_dict`, as of `accelerate.load_state`, onto a model that was made for other weights."""
    torch.manual_seed(3)
    first = get_peft_model(WIDE.model(seed=1), SvfitConfig(init_weights=False, **fields, **WIDE.targets)).eval()
    second = get_peft_model(WIDE.model(seed=2), SvfitConfig(init_weights=False, **fields, **WIDE.targets)).eval()
    run(second, WIDE.batch())
    second.load_state_dict(first.state_dict())
    assert_near_to(run(second, WIDE.batch()), run(first, WIDE.batch()))
    assert_is_its_dense_self(second, WIDE.batch())


def assert_near_to(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_base_weights_that_change_later_are_the_ones_that_are_used() -> None:
    """The factored form keeps U^T W; it is made again."""
    model = get_peft_model(WIDE.model(), SvfitConfig(r="full", init_weights=False, **WIDE.targets)).eval()
    run(model, WIDE.batch())
    other = WIDE.model(seed=5)
    with torch.no_grad():
        for name in ("first", "second"):
            model.get_base_model().get_submodule(name).base_layer.weight.copy_(getattr(other, name).weight)
    assert_is_its_dense_self(model, WIDE.batch())


def with_foreign_basis(tmp_path: Path, **fields: Any) -> str:
    """A file that has the basis of another base."""
    model = get_peft_model(WIDE.model(seed=9), SvfitConfig(init_weights=False, **{"r": 16, **fields}, **WIDE.targets))
    model.save_pretrained(str(tmp_path / "foreign"))
    return str(tmp_path / "foreign")


def test_a_weighted_sum_beside_another_basis_leaves_it_alone(tmp_path: Path) -> None:
    path = with_foreign_basis(tmp_path)
    model = get_peft_model(WIDE.model(), SvfitConfig(r=16, init_weights=False, **WIDE.targets)).eval()
    before = run(model, WIDE.batch())
    model.load_adapter(path, "foreign")
    model.set_adapter("foreign")
    foreign = run(model, WIDE.batch())
    model.add_weighted_adapter(["foreign"], [1.0], "sum")
    model.set_adapter("sum")
    assert_near_to(run(model, WIDE.batch()), foreign)
    model.set_adapter("default")
    assert torch.equal(run(model, WIDE.batch()), before)


def test_a_new_adapter_of_another_kind_decomposes_its_own_weight(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(WIDE.model(), with_foreign_basis(tmp_path))
    run(model, WIDE.batch())
    for fields in ({"svd": "full", "r": 16}, {"r": 20}, {"r": 16, "basis_dtype": "float32"}, {"r": 16, "save_basis": False}):
        model.add_adapter("new", SvfitConfig(**fields, **WIDE.targets))
        fresh = get_peft_model(WIDE.model(), SvfitConfig(**fields, **WIDE.targets))
        for mine, theirs in zip(deltas(model, "new").values(), deltas(fresh).values(), strict=True):
            assert torch.equal(mine.singular_values, theirs.singular_values)
            assert torch.equal(mine.basis, theirs.basis)
        model.delete_adapter("new")


def test_a_new_adapter_of_the_same_kind_shares_the_basis_that_is_there(tmp_path: Path) -> None:
    """Also one from a file: copies of the trained values are then copies of the adapter (tests/contract/test_reference.py)."""
    model = PeftModel.from_pretrained(WIDE.model(), with_foreign_basis(tmp_path))
    for r in (16, 5):  # or its leading part
        model.add_adapter("new", SvfitConfig(r=r, **WIDE.targets))
        for mine, theirs in zip(deltas(model, "new").values(), deltas(model).values(), strict=True):
            assert mine.basis.untyped_storage().data_ptr() == theirs.basis.untyped_storage().data_ptr()
            assert torch.equal(mine.singular_values, theirs.singular_values[:r])
        model.delete_adapter("new")


def test_a_file_with_a_full_basis_onto_a_used_adapter(tmp_path: Path) -> None:
    fields = {"r": "full", "save_basis": True, "basis_dtype": "float32"}
    path = with_foreign_basis(tmp_path, **fields)
    model = get_peft_model(WIDE.model(), SvfitConfig(init_weights=False, **fields, **WIDE.targets)).eval()
    run(model, WIDE.batch())
    model.load_adapter(path, "default")
    assert_is_its_dense_self(model, WIDE.batch())


def test_files_with_equal_bases_share_them(tmp_path: Path) -> None:
    model, batch = adapt("llama", r=4)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path))
    loaded.load_adapter(str(tmp_path), "again")
    for adapter in ("default", "again"):
        loaded.set_adapter(adapter)
        assert torch.equal(run(loaded, batch), run(model, batch))
    for a, b in zip(deltas(loaded).values(), deltas(loaded, "again").values(), strict=True):
        assert a.basis.untyped_storage().data_ptr() == b.basis.untyped_storage().data_ptr()


def test_adapters_of_a_narrow_base_look_along_when_they_are_loaded(tmp_path: Path, decompositions: list[Any]) -> None:
    model = get_peft_model(WIDE.model(torch.bfloat16), SvfitConfig(r="full", init_weights=False, **WIDE.targets)).eval()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(WIDE.model(torch.bfloat16), str(tmp_path))
    decompositions.clear()
    loaded.load_adapter(str(tmp_path), "again")
    loaded.set_adapter("again")
    batch = WIDE.batch(torch.bfloat16)
    assert torch.equal(run(loaded, batch), run(model, batch))
    assert not decompositions


@pytest.mark.parametrize("save_basis", [True, False])
def test_an_offloaded_base(save_basis: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = get_peft_model(WIDE.model(), SvfitConfig(r=16, save_basis=save_basis, init_weights=False, **WIDE.targets)).eval()
    model.save_pretrained(str(tmp_path))
    base = WIDE.model()
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.first.weight.is_meta
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    if save_basis:
        assert torch.equal(run(loaded, WIDE.batch()), run(model, WIDE.batch()))
    else:
        with pytest.raises(ValueError, match=r"first\.weight: the weight is not in memory.*offloaded"):
            run(loaded, WIDE.batch())


def test_a_model_that_is_cast_leaves_the_factored_form() -> None:
    model = get_peft_model(WIDE.model(), SvfitConfig(r="full", init_weights=False, **WIDE.targets)).eval()
    run(model, WIDE.batch())
    model.to(torch.bfloat16)
    for layer in ("first", "second"):
        delta = model.get_base_model().get_submodule(layer).svfit_delta["default"]
        assert not delta._may_factor(torch.ones(1, dtype=torch.bfloat16))
        assert delta.singular_values.dtype == delta.probe.dtype == torch.float32
        update = model.get_base_model().get_submodule(layer).get_delta_weight("default")
        assert update.dtype == torch.float32


def test_energy_on_a_meta_base_trains_and_is_saved(tmp_path: Path) -> None:
    """Its rank was bounded when the adapter was made; an optimizer may hold its parameters since."""
    with torch.device("meta"):
        empty = WIDE.build().eval().requires_grad_(False)
    model = get_peft_model(empty, SvfitConfig(energy=0.5, save_basis=True, **WIDE.targets), low_cpu_mem_usage=True)
    model.get_base_model().to_empty(device="cpu")
    model.get_base_model().load_state_dict(WIDE.model().state_dict(), strict=False)
    with torch.no_grad():
        for name in ("first", "second"):
            layer = model.get_base_model().get_submodule(name)
            layer.base_layer.load_state_dict(getattr(WIDE.model(), name).state_dict())
            for tensor in layer.svfit_delta["default"].state_dict(keep_vars=True).values():
                tensor.zero_()
    parameters = [delta.shift for delta in deltas(model).values()]
    losses = train(model, WIDE.batch(), steps=5)
    assert losses[-1] < losses[0]
    assert all(a is b for a, b in zip(parameters, [delta.shift for delta in deltas(model).values()], strict=True))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(WIDE.model(), str(tmp_path))
    assert torch.equal(run(loaded, WIDE.batch()), run(model, WIDE.batch()))


def test_energy_with_low_cpu_mem_usage_on_a_real_base() -> None:
    model = get_peft_model(WIDE.model(), SvfitConfig(energy=0.5, **WIDE.targets), low_cpu_mem_usage=True)
    expected = get_peft_model(WIDE.model(), SvfitConfig(energy=0.5, **WIDE.targets))
    assert [delta.r for delta in deltas(model).values()] == [delta.r for delta in deltas(expected).values()]


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_the_first_use_may_be_anywhere(context: Any, tmp_path: Path) -> None:
    """Loaded by transformers, so that the basis is made at the first use: under inference_mode, or under autocast."""
    model, batch = adapt("llama", r="full", save_basis=False, basis_dtype="float32")
    model.save_pretrained(str(tmp_path))
    loaded: Any = MODELS["llama"].model()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    with context():
        loaded(**batch)
    assert torch.equal(run(loaded, batch), run(model, batch))
    losses = train(loaded, batch)
    assert losses[-1] < losses[0]


def test_updates_are_float32_under_autocast() -> None:
    model, _ = adapt("linear", r=2)
    layer = model.get_base_model().layer
    expected = layer.get_delta_weight("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), expected)


def test_keep_basis_of_layers_in_several_dtypes(tmp_path: Path) -> None:
    base = WIDE.model()
    base.second.to(torch.bfloat16)
    config = SvfitConfig(r="full", init_weights=False, **WIDE.targets)
    model = get_peft_model(base, config)
    before = {name: delta.basis.clone() for name, delta in deltas(model).items()}
    model.keep_basis()
    model.save_pretrained(str(tmp_path))
    again = WIDE.model()
    again.second.to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(again, str(tmp_path))
    for name, delta in deltas(loaded).items():
        assert torch.equal(delta.basis, before[name].float())
    wide = get_peft_model(WIDE.model().double(), SvfitConfig(r=4, save_basis=False, **WIDE.targets)).double()
    wide.keep_basis()
    assert wide.peft_config["default"].basis_dtype == "float32"


def test_an_empty_batch() -> None:
    for name in ("conv2d", "conv, groups", "linear", "conv, pointwise"):
        model, batch = adapt(name, r=2)
        assert run(model, {"x": batch["x"][:0]}).shape == run(LAYERS[name].model(), {"x": batch["x"][:0]}).shape


def test_half_precision_shifts_of_small_weights_stay_finite() -> None:
    base = WIDE.model()
    with torch.no_grad():
        base.first.weight.mul_(1e-4)
    model = get_peft_model(base.half(), SvfitConfig(r=16, **WIDE.targets), autocast_adapter_dtype=False)
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.shift.fill_(1e-3)
    assert torch.isfinite(run(model, WIDE.batch(torch.half))).all()


@pytest.mark.parametrize("form", ["built", "factored"])
def test_a_base_weight_that_is_trained_gets_its_gradient(form: Any) -> None:
    model = get_peft_model(WIDE.model(), SvfitConfig(r="full", form=form, init_weights=False, **WIDE.targets))
    weight = model.get_base_model().first.base_layer.weight.requires_grad_()
    model(**WIDE.batch()).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_a_pointwise_convolution_is_scaled_on_its_smaller_side() -> None:
    base = nn.Sequential(nn.Conv2d(4, 16, 1))
    x = torch.randn(2, 4, 5, 5)
    model = get_peft_model(copy.deepcopy(base), SvfitConfig(r=3, init_weights=False, target_modules=["0"]))
    (delta,) = deltas(model).values()
    assert delta.basis.shape == (3, 4)
    found = model(x)
    torch.testing.assert_close(found, model.merge_and_unload()(x), rtol=1e-5, atol=1e-5)
