"""What only aTLAS has: pools of task vectors, their coefficients, what shares them, and when a weight is composed anew."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_subspace import AtlasConfig, AtlasDelta, FloraConfig, SvfitConfig, draw_coefficients, save_as_lora
from peft_subspace.base import effective
from peft_subspace.base.geometry import Geometry
from peft_subspace.base.holders import Holder
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.task_vector import TaskVector
from peft_subspace.training.selection import coefficient_gradients, select_vectors
from tests.pico import LAYERS, MODELS, Pico, loss, output, run, train
from tests.pools import fine_tuned, pool_of, vector_of, write_vector
from tests.processes import peak_growth

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


def adapt(name: str | Pico, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model with random coefficients for everything that the pool changes, and a batch."""
    pico = MODELS[name] if isinstance(name, str) else name
    config = AtlasConfig(**{"pool": pool_of(pico), "init_weights": False, **fields})
    return get_peft_model(pico.model(dtype), config).eval(), pico.batch(dtype)


def deltas(model: Any, adapter: str = "default") -> dict[str, AtlasDelta]:
    """Name of every block -> its Delta."""
    found: dict[str, AtlasDelta] = {}
    for _, layer in model.base_model.named_subspace_layers():
        for delta in layer.deltas(adapter).values():
            found.setdefault(delta.block, delta)  # a tied weight is the block of the first
    return found


def composed_state(pico: Pico, model: Any, coefficients: dict[str, Tensor], adapter: str = "default") -> dict[str, Tensor]:
    """theta_0 + sum_t lambda_t tau_t of every parameter, written out with PyTorch alone, from the files of the pool."""
    config = model.peft_config[adapter]
    vectors = [load_file(config.pool[name]) for name in config.vector_names]
    state = {}
    for name, parameter in pico.model().named_parameters():
        state[name] = parameter.detach()
        if name in coefficients:
            for value, vector in zip(coefficients[name], vectors, strict=True):
                state[name] = state[name] + value * vector[name]
    return state


# The definition ----------------------------------------------------------------------------------------------------------


class Gained(nn.Module):
    """A child and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


class Net(nn.Module):
    """All norms, and a gain beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group, self.rms, self.inner = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8), Gained()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.rms(self.group(self.layer(x))))


NORMS = Pico(Net, lambda: {"x": torch.randn(4, 8)})
KINDS = {
    **{name: LAYERS[name] for name in ("linear", "Conv1D", "conv2d", "conv, groups", "transposed2d", "embedding", "experts")},
    **{name: MODELS[name] for name in ("mha", "gpt2", "vit", "t5")},
    "norms": NORMS,
}
CONSTRAINED: dict[str | None, Any] = {
    None: lambda numbers: numbers,
    "nonnegative": torch.relu,
    "softmax": lambda numbers: numbers.exp() / numbers.exp().sum(0),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_gradients_are_those_of_functional_call(constraint: Any, name: str) -> None:
    """For every kind of block, float32: sum over T of products in another order, hence 1e-5 of the largest."""
    pico = KINDS[name]
    model, batch = adapt(pico, constraint=constraint)
    own = deltas(model)
    assert set(own) == {name for name, _ in pico.model().named_parameters()}
    leaves = {name: delta.coefficients.detach().clone().requires_grad_() for name, delta in own.items()}
    base = pico.model()
    state = composed_state(pico, model, {name: CONSTRAINED[constraint](leaf) for name, leaf in leaves.items()})
    expected = output(lambda **inputs: torch.func.functional_call(base, state, (), inputs), batch)  # type: ignore[arg-type]
    found = output(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(leaves.values()), weights)
    mine = torch.autograd.grad(found, [delta.coefficients for delta in own.values()], weights)
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for block, one, other in zip(own, mine, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * largest, block


GRANULARITIES = {
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "partition": {"granularity": "partition", "partition": 3},
    "split": {"fused_splits": {"weight": 2}},
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv2d", "conv, groups", "transposed2d", "embedding"])
def test_coefficients_act_on_their_entries_alone(granularity: str, name: str) -> None:
    """Each coefficient by itself gives its vector there and nothing elsewhere; rows are outputs, whatever the layout."""
    model, _ = adapt(LAYERS[name], **GRANULARITIES[granularity])
    layer = model.get_base_model().layer
    delta = deltas(model)["layer.weight"]
    geometry, vectors = delta.geometry, [load_file(path)["layer.weight"] for path in pool_of(LAYERS[name]).values()]
    total = torch.zeros(geometry.shape)
    for t in range(2):
        for k in range(delta.coefficients.shape[1]):
            with torch.no_grad():
                delta.coefficients.zero_()
                delta.coefficients[t, k] = 1.0
            found = delta.delta_weight(lambda: None).detach()  # type: ignore[arg-type, return-value]
            whole = geometry.canonical(vectors[t])
            part = found != 0
            assert torch.equal(found[part], whole[part])
            total += found / whole
            if granularity == "row":
                assert part[k].all()
                assert part.sum() == part[k].numel()
            if granularity == "column":
                assert part[:, k].all()
                assert part.sum() == part[:, k].numel()
            if granularity == "split":
                assert part.chunk(2)[k].all()
            composed = torch.zeros_like(layer.get_base_layer().weight)
            delta.accumulate(composed)
            torch.testing.assert_close(composed, geometry.native(found))
    torch.testing.assert_close(total, torch.full_like(total, 2.0))  # both vectors: every entry once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_vector_with_coefficient_one_is_the_fine_tuned_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """From folders as `save_pretrained` writes them, and the base by its name."""
    base, tuned = MODELS["llama"].model(dtype), MODELS["llama"].model(dtype, seed=0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    pool = {"tuned": str(tmp_path / "tuned")}
    model = get_peft_model(base, AtlasConfig(pool=pool, base=str(tmp_path / "base"), init=1.0))
    merged = model.merge_and_unload().state_dict()
    for name, parameter in tuned.state_dict().items():  # tau = theta - theta_0 is rounded to float32, then the sum
        torch.testing.assert_close(merged[name].float(), parameter.float(), rtol=0, atol=2e-7 * float(parameter.abs().max()))


def test_lora_adapters_are_composed_exactly(tmp_path: Path) -> None:
    """tau = s B A: the composed model is that of the merged LoRAs, weighted, and no weight is made for it."""
    pico = MODELS["llama"]
    for number, options in enumerate(({"r": 2, "lora_alpha": 3}, {"r": 4, "lora_alpha": 8, "use_rslora": True})):
        torch.manual_seed(number)
        lora = get_peft_model(
            pico.model(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
        )
        lora.save_pretrained(str(tmp_path / str(number)))
    pool = {"a": str(tmp_path / "0"), "b": str(tmp_path / "1")}
    model = get_peft_model(pico.model(), AtlasConfig(pool=pool, init={"a": 0.7, "b": -0.4}))
    oracle: Any = PeftModel.from_pretrained(pico.model(), pool["a"], adapter_name="a")
    oracle.load_adapter(pool["b"], adapter_name="b")
    oracle.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="cat")
    expected = pico.model().state_dict()
    for name, module in oracle.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            expected[f"{name}.weight"] = (
                expected[f"{name}.weight"] + 0.7 * module.get_delta_weight("a") - 0.4 * module.get_delta_weight("b")
            ).detach()
    base = pico.model()
    base.load_state_dict(expected)
    batch = pico.batch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effective, "compose", lambda *args: pytest.fail("a weight was composed"))
        found = run(model, batch)
    torch.testing.assert_close(found, run(base, batch), rtol=1e-4, atol=1e-5)
    merged = run(model.merge_and_unload(), batch)
    torch.testing.assert_close(merged, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config", [FloraConfig(r=2, target_modules=["q_proj"]), SvfitConfig(r="full", target_modules=["q_proj"])]
)
def test_adapters_of_this_package_are_vectors(config: Any, tmp_path: Path) -> None:
    """SVFit's update is made of the base's own weight, which the pool knows."""
    MODELS["llama"].model().save_pretrained(str(tmp_path / "base"))  # type: ignore[operator]
    batch = MODELS["llama"].batch()

    def base() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))

    torch.manual_seed(3)
    trained = get_peft_model(base(), copy.deepcopy(config))
    train(trained, batch)
    trained.save_pretrained(str(tmp_path / "adapter"))
    model = get_peft_model(base(), AtlasConfig(pool={"own": str(tmp_path / "adapter")}, init=1.0))
    torch.testing.assert_close(run(model, batch), run(trained, batch), rtol=1e-4, atol=1e-5)


def test_export_to_lora_is_exact_where_all_vectors_have_low_rank(tmp_path: Path) -> None:
    pico = MODELS["llama"]
    model, batch = adapt(pico, pool=pool_of(pico, 2), target_modules="all-linear")
    save_as_lora(model, str(tmp_path))
    plain = PeftModel.from_pretrained(pico.model(), str(tmp_path))
    torch.testing.assert_close(run(plain, batch), run(model, batch), rtol=1e-4, atol=1e-5)


def test_softmax_shares_one_among_the_vectors(tmp_path: Path) -> None:
    """A new adapter is the average; the sum of two is none."""
    pico = MODELS["llama"]
    model, batch = adapt(pico, constraint="softmax", init_weights=True)
    average, _ = adapt(pico, init=0.5, init_weights=True)
    torch.testing.assert_close(run(model, batch), run(average, batch))
    train(model, batch)
    for values in model.base_model.coefficients().values():
        torch.testing.assert_close(values.sum(0), torch.tensor(1.0))
    model.add_adapter("other", AtlasConfig(pool=pool_of(pico), constraint="softmax"))
    with pytest.raises(ValueError, match="under constraint='softmax' is no softmax"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_a_constraint_leaves_activation_checkpointing_as_it_is() -> None:
    """No graph is gone through inside of a backward: a checkpointed segment is computed twice, not once for each block."""
    counts, calls = [], list[Any]()
    own = effective.compose

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return own(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effective, "compose", counted)
        for constraint in CONSTRAINED:
            model, batch = adapt("mlp", constraint=constraint)
            (x,) = batch.values()
            calls.clear()
            checkpoint(model.train(), x, use_reentrant=False).square().sum().backward()
            counts.append(len(calls))
    assert counts == [2 * len(deltas(model))] * len(CONSTRAINED)


# What shares coefficients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_one_coefficient_for_the_model_is_stored_once_and_stays_shared(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, batch = adapt("vit", granularity="task")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(2,)]
    train(model, batch)
    model.save_pretrained(str(tmp_path))
    (tensor,) = load_file(tmp_path / "adapter_model.safetensors").values()
    loaded = PeftModel.from_pretrained(
        MODELS["vit"].model(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    for twin in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(run(twin, batch), run(model, batch))
        twin.load_state_dict(twin.state_dict())
        train(twin, batch, steps=1)
        values = list(twin.base_model.coefficients().values())
        assert all(torch.equal(value, values[0]) for value in values)
        assert not torch.equal(values[0], tensor)


def test_isotropic_is_anisotropic_with_equal_coefficients() -> None:
    one, batch = adapt("vit", granularity="task")
    many, _ = adapt("vit", init_weights=True)
    (value,) = {tuple(value.tolist()) for value in one.base_model.coefficients().values()}
    with torch.no_grad():
        for delta in deltas(many).values():
            delta.coefficients.copy_(torch.tensor(value))
    assert torch.equal(run(many, batch), run(one, batch))
    gradients = []
    for model in (one, many):
        loss(model, batch).backward()
        gradients.append(sum(p.grad for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_partition_into_one_part_is_block() -> None:
    whole, batch = adapt("llama", init_weights=True, init=0.3)
    one, _ = adapt("llama", init_weights=True, init=0.3, granularity="partition", partition=1)
    torch.testing.assert_close(run(one, batch), run(whole, batch), rtol=1e-6, atol=1e-6)


def test_tied_blocks_within_a_layer() -> None:
    model, _ = adapt("llama", tie_blocks=[["q_proj.weight", "k_proj.weight"]])
    coefficients = model.base_model.coefficients()
    for layer in range(2):
        q, k, v = (deltas(model)[f"model.layers.{layer}.self_attn.{name}_proj.weight"].trained[0] for name in "qkv")
        assert q is k is not v
    first, second = (coefficients[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(2))
    assert not torch.equal(first, second)


def test_a_tied_weight_is_one_block() -> None:
    """Found by identity: the file of the vector has only one of the names."""
    model, batch = adapt("llama, tied")
    coefficients = model.base_model.coefficients()
    assert "lm_head.weight" not in coefficients
    embedding, head = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert head.atlas_delta["default"].trained[0] is embedding.atlas_delta["default"].coefficients
    state = composed_state(MODELS["llama, tied"], model, coefficients)
    base = MODELS["llama, tied"].model()
    base.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    torch.testing.assert_close(run(model, batch), run(base, batch), rtol=1e-5, atol=1e-5)


def test_two_adapters_on_one_pool_hold_it_once() -> None:
    """By reference, also where one of them leaves a vector out."""
    model, _ = adapt("llama")
    model.add_adapter("other", AtlasConfig(pool=pool_of(MODELS["llama"]), exclude_pool=["task0"]))
    first, second = deltas(model), deltas(model, "other")
    assert first.keys() == second.keys()
    for name, delta in first.items():
        assert delta.vectors is not None
        assert second[name].vectors == [delta.vectors[1]]  # compared by identity
    twin = copy.deepcopy(model)
    assert all(delta.vectors == deltas(model)[name].vectors for name, delta in deltas(twin).items())


# Options -----------------------------------------------------------------------------------------------------------------


def test_options() -> None:
    model, _ = adapt("llama", init={"task1": 0.3}, init_weights=True, block_types=["norm", "embedding"])
    found = model.base_model.coefficients()
    assert all("norm" in name or name in ("model.embed_tokens.weight",) for name in found)
    assert all(value.tolist() == pytest.approx([0.0, 0.3]) for value in found.values())
    model, _ = adapt("llama", exclude_pool=["task1"], target_modules=["q_proj"])
    assert model.peft_config["default"].vector_names == ["task0"]
    assert {tuple(value.shape) for value in model.base_model.coefficients().values()} == {(1,)}
    groups = model.base_model.coefficient_groups(lr=0.1)
    assert [len(group["params"]) for group in groups] == [2]
    assert groups[0]["lr"] == 0.1


def test_nonnegative_coefficients_are_not_crossed() -> None:
    model, batch = adapt("mlp", constraint="nonnegative", init=-0.1, init_weights=True)
    base = run(MODELS["mlp"].model(), batch)
    assert torch.equal(run(model, batch), base)
    loss(model, batch).backward()
    assert all(not delta.coefficients.grad.any() for delta in deltas(model).values())  # type: ignore[union-attr]
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.coefficients.fill_(0.2)
    loss(model, batch).backward()
    assert all(delta.coefficients.grad.all() for delta in deltas(model).values())  # type: ignore[union-attr]


def test_a_small_vector_survives_float16(tmp_path: Path) -> None:
    """At 1e-6 it would lie among the subnormal numbers; with one scale it keeps the eleven bits of the type."""
    vector = {name: 1e-6 * value for name, value in vector_of(MODELS["mlp"].model(), 0).items()}
    pool = {"small": write_vector(tmp_path / "small.safetensors", vector)}
    model, _ = adapt("mlp", pool=pool, vector_dtype="float16", init=1.0, init_weights=True)
    for name, delta in deltas(model).items():
        found = delta.delta_weight(lambda: None).detach()  # type: ignore[arg-type, return-value]
        assert float((found - vector[name]).norm() / vector[name].norm()) < 5e-4


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_where_the_vectors_are_does_not_matter(placement: str, tmp_path: Path) -> None:
    """A step and its result, to the bit; for "disk" of models that are differences of two files too."""
    base: Any = MODELS["llama"].model()
    tuned: Any = fine_tuned(MODELS["llama"])
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    results = []
    pool = {**pool_of(MODELS["llama"]), "tuned": str(tmp_path / "tuned")}
    for where in ("device", placement):
        model, batch = adapt("llama", pool=pool, base=str(tmp_path / "base"), placement=where, init_weights=True)
        train(model, batch)
        results.append(run(model, batch))
    assert torch.equal(*results)


MEMORY = """
import sys, torch
from torch import nn
from peft import get_peft_model
from peft_subspace import AtlasConfig
from benchmarks.measure import resident_growth

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
    def forward(self, x):
        return self.b(self.a(x))

count = int(sys.argv[2])
pool = {str(t): f"{sys.argv[1]}/{t}.safetensors" for t in range(count)}
model = get_peft_model(Net(), AtlasConfig(pool=pool, placement=sys.argv[3]))
x = torch.randn(4, 1024)
def step():
    model(x).square().sum().backward()
step()  # what PyTorch sets up for itself is there
print(resident_growth(step))
"""


@pytest.mark.parametrize("placement", ["disk", "device"])
def test_memory_of_a_step_does_not_grow_with_the_vectors(placement: str, tmp_path: Path) -> None:
    """Peak of the resident set over what is held before, in fresh processes: 8 MB of weights, vectors of 8 MB each.

    On disk nothing of the vectors is held before, on the device they are.
    """
    for t in range(8):
        tensors = {f"{layer}.weight": 0.01 * torch.randn(1024, 1024) for layer in "ab"}
        write_vector(tmp_path / f"{t}.safetensors", tensors)
    two, eight = (peak_growth(MEMORY, tmp_path, count, placement) for count in (2, 8))
    assert eight < two + 2**20  # the other six are 48 MB


# When a weight is composed -----------------------------------------------------------------------------------------------


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one name for every weight that is composed."""
    found: list[str] = []
    compose = effective.compose

    def counted(layer: Any, container: str, names: Any) -> Tensor:
        found.append(container)
        return compose(layer, container, names)

    monkeypatch.setattr(effective, "compose", counted)
    return found


def test_evaluation_composes_once_per_change(compositions: list[str]) -> None:
    model, batch = adapt("mlp")
    first = run(model, batch)
    assert len(compositions) == 6
    assert torch.equal(run(model, batch), first)
    assert len(compositions) == 6
    coefficients = deltas(model)["first.weight"].coefficients
    coefficients.data.mul_(2)  # no version is counted
    assert not torch.equal(run(model, batch), first)
    assert len(compositions) == 7
    with torch.no_grad():
        coefficients.div_(2)
    assert torch.equal(run(model, batch), first)
    assert len(compositions) == 8
    base = model.get_base_model().first.base_layer.weight
    with torch.no_grad():
        base.add_(1)
    assert not torch.equal(run(model, batch), first)
    assert len(compositions) == 9
    base.data.sub_(1)  # not seen, until the mode is set
    model.eval()
    torch.testing.assert_close(run(model, batch), first)


def test_what_was_composed_for_inference_does_not_stand_in_the_way_of_training(compositions: list[str]) -> None:
    model, batch = adapt("mlp")
    with torch.inference_mode():
        expected = output(model, batch)
    x = batch["x"].clone().requires_grad_()
    loss(model, {"x": x}).backward()
    assert x.grad is not None
    assert torch.equal(run(model, batch), expected)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    run(model, batch)
    assert torch.equal(output(model, {"x": x}).detach(), expected)  # frozen coefficients, and an input with a gradient


def test_a_change_between_forward_and_backward_leaves_the_gradient_right() -> None:
    model, batch = adapt("mlp")
    loss(model, batch).backward()
    expected = {name: delta.coefficients.grad.clone() for name, delta in deltas(model).items()}  # type: ignore[union-attr]
    model.zero_grad()
    value = loss(model, batch)
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.coefficients.add_(1)
    run(model, batch)  # composes anew
    value.backward()
    for name, delta in deltas(model).items():
        assert torch.equal(delta.coefficients.grad, expected[name])  # type: ignore[arg-type]


def test_switching_adapters(compositions: list[str]) -> None:
    """Every set of active adapters has its own weight; going back composes again, and never shows another's."""
    model, batch = adapt("mlp")
    torch.manual_seed(5)
    model.add_adapter("other", AtlasConfig(pool=pool_of(MODELS["mlp"]), init_weights=False))
    results = {}
    for names in (["default"], ["other"], ["default", "other"], ["default"], ["other"]):
        model.base_model.set_adapter(names)
        found = run(model, batch)
        assert torch.equal(results.setdefault(tuple(names), found), found)
    assert len({tuple(value.flatten().tolist()) for value in results.values()}) == 3


# Parameters of modules with children -------------------------------------------------------------------------------------


def test_a_class_token_is_a_block_like_any_other(tmp_path: Path) -> None:
    pico = MODELS["vit"]
    model, batch = adapt("vit")
    names = {name for name in deltas(model) if name.endswith(("cls_token", "position_embeddings"))}
    assert names == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    alone, _ = adapt("vit", target_parameters=sorted(names))
    assert set(deltas(alone)) == names
    base = run(pico.model(), batch)
    assert not torch.equal(run(alone, batch), base)
    with alone.disable_adapter():
        assert torch.equal(run(alone, batch), base)
    alone.add_adapter("other", AtlasConfig(pool=pool_of(pico), init_weights=False))  # finds the layers below the holders
    assert set(deltas(alone, "other")) == set(deltas(model))
    alone.set_adapter("other")
    other = run(alone, batch)
    for twin in (copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        holders = [module for module in twin.modules() if isinstance(module, Holder)]
        assert len(holders) == 2
        assert all(holder.get_base_layer() is twin.get_base_model().vit.embeddings for holder in holders)
        assert torch.equal(run(twin, batch), other)
    with pytest.raises(ValueError, match=r"does not work with target_parameters \(cls_token, position_embeddings\)"):
        run(alone, batch, adapter_names=["other"] * 4)
    alone.merge_adapter()
    torch.testing.assert_close(run(alone, batch), other, rtol=1e-5, atol=1e-5)
    alone.unmerge_adapter()
    assert torch.equal(run(alone, batch), other)
    alone.delete_adapter("default")
    assert torch.equal(run(alone, batch), other)
    plain = alone.unload()
    assert torch.equal(run(plain, batch), base)
    assert [type(module) for module in plain.modules()] == [type(module) for module in pico.model().modules()]
    embeddings = plain.vit.embeddings
    assert not embeddings._forward_pre_hooks
    assert not embeddings._forward_hooks


def test_an_error_inside_takes_the_composed_parameter_away() -> None:
    model, batch = adapt("vit")
    before = run(model, batch)
    with pytest.raises(Exception, match=r".*"):
        run(model, {"pixel_values": torch.zeros(1, 3, 5, 5)})
    assert "cls_token" not in vars(model.get_base_model().vit.embeddings)
    assert torch.equal(run(model, batch), before)


def test_running_statistics_among_the_parameters_move_nothing(tmp_path: Path) -> None:
    """Vectors are matched by name."""
    pico = MODELS["batch norm"]
    state = {name: value for name, value in pico.model(seed=2).state_dict().items() if value.is_floating_point()}
    save_file(
        dict(reversed(state.items())), tmp_path / "v.safetensors", metadata={"peft_subspace": "task_vector", "format": "pt"}
    )
    model, _ = adapt(pico, pool={"v": str(tmp_path / "v.safetensors")}, init=1.0, init_weights=True, strict=False)
    own = deltas(model)
    assert set(own) == {name for name, _ in pico.model().named_parameters()}
    for name, delta in own.items():
        assert torch.equal(delta.geometry.native(delta.delta_weight(lambda: None).detach()), state[name])  # type: ignore[arg-type, return-value]


# Files -------------------------------------------------------------------------------------------------------------------


def saved(folder: Path, name: str = "llama", **fields: Any) -> tuple[Path, dict[str, str], Any]:
    """An adapter, its pool in a folder of its own, and the model."""
    pool = {}
    (folder / "pool").mkdir()
    for key, path in pool_of(MODELS[name]).items():
        pool[key] = str(shutil.copy(path, folder / "pool" / f"{key}.safetensors"))
    model, _ = adapt(name, pool=pool, **fields)
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter", pool, model


def test_a_file_has_coefficients_and_what_they_belong_to(tmp_path: Path) -> None:
    adapter, _, _ = saved(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"coefficients"}
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2,)}
    config = json.loads((adapter / "adapter_config.json").read_text())
    records = config["provenance"]["vectors"]
    assert [record["name"] for record in records] == ["task0", "task1"]
    for record in records:
        (part,) = record["parts"]
        assert part["kind"] == "task_vector"
        assert {"bytes", "tensors_sha256"} == set(part["files"][0])
    assert 0 < len(config["provenance"]["base"]["values"]) <= 64
    card = (adapter / "README.md").read_text()
    assert "| Task vectors | task0 (`task0.safetensors`), task1 (`task1.safetensors`) |" in card
    assert str(tmp_path) not in card


def test_the_size_of_a_file_for_a_vit_of_twelve_layers(tmp_path: Path) -> None:
    """152 blocks, 21 vectors: under 100 kB. Narrow, because coefficients do not depend on the width."""
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2, image_size=8, patch_size=4
    )
    pico = Pico(lambda: transformers.ViTForImageClassification(config), MODELS["vit"].inputs)
    model, _ = adapt(pico, pool=pool_of(pico, count=21))
    model.save_pretrained(str(tmp_path))
    assert len(model.base_model.coefficients()) > 190  # q, k and v are blocks of their own here
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000


def load(adapter: Path, seed: int = 0, pool: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    config = AtlasConfig.from_pretrained(str(adapter))
    config.pool = pool or config.pool
    return PeftModel.from_pretrained(MODELS["llama"].model(dtype, seed=seed), str(adapter), config=config)


def test_a_moved_pool_is_accepted(tmp_path: Path) -> None:
    adapter, pool, model = saved(tmp_path)
    shutil.move(tmp_path / "pool", tmp_path / "elsewhere")
    batch = MODELS["llama"].batch()
    with pytest.raises(InputError, match=r"'task0'.*no such folder or file"):
        load(adapter)
    moved = {name: path.replace("/pool/", "/elsewhere/") for name, path in reversed(pool.items())}  # in another order too
    loaded = load(adapter, pool=moved)
    assert torch.equal(run(loaded, batch), run(model, batch))
    assert run(load(adapter, pool=moved, dtype=torch.bfloat16), batch).dtype == torch.bfloat16


def test_another_pool_is_refused_by_name(tmp_path: Path) -> None:
    adapter, pool, _ = saved(tmp_path)
    with pytest.raises(
        InputError, match=r"task vector 'task0' at .*task1.* is not the one that the coefficients were learned with"
    ):
        load(adapter, pool={"task0": pool["task1"], "task1": pool["task0"]})
    with pytest.raises(ValueError, match=r"no task vectors \['task1'\], for which there are coefficients"):
        load(adapter, pool={"task0": pool["task0"]})
    values = load_file(pool["task1"])
    values["model.norm.weight"][0] += 1
    write_vector(Path(pool["task1"]), values)
    model = MODELS["llama"].model()
    with pytest.raises(InputError, match="'task1'"):
        PeftModel.from_pretrained(model, str(adapter))
    assert not hasattr(model, "peft_config")
    assert torch.equal(run(model, MODELS["llama"].batch()), run(MODELS["llama"].model(), MODELS["llama"].batch()))


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter, _, _ = saved(tmp_path)
    with pytest.raises(InputError, match=r"LlamaForCausalLM is not the base.*lm_head\.weight"):
        load(adapter, seed=1)
    config = AtlasConfig.from_pretrained(str(adapter))
    config.provenance["base"] = None
    PeftModel.from_pretrained(MODELS["llama"].model(seed=1), str(adapter), config=config)


def test_a_config_can_be_put_on_one_model_after_another() -> None:
    """Only that of a file belongs to a base."""
    config = AtlasConfig(pool={name: Path(path) for name, path in pool_of(MODELS["mlp"]).items()})
    for seed in range(2):
        get_peft_model(MODELS["mlp"].model(seed=seed), config)
    assert config.provenance is not None


def test_the_composed_vector_is_a_task_vector_and_a_picture(tmp_path: Path) -> None:
    """In a pool of its own, with coefficient one, it is the composed model."""
    pico = MODELS["vit"]
    model, batch = adapt("vit")
    model.base_model.save_task_vector(tmp_path / "learned.safetensors")
    again, _ = adapt("vit", pool={"learned": str(tmp_path / "learned.safetensors")}, init=1.0, init_weights=True)
    torch.testing.assert_close(run(again, batch), run(model, batch), rtol=1e-5, atol=1e-5)
    rows, _ = adapt("vit", granularity="row", pool=pool_of(pico))
    for one in (model, rows):
        draw_coefficients(one.base_model.coefficients(), ["task0", "task1"], tmp_path / "map.png")
        assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_a_merge_recipe_is_told_what_to_take(tmp_path: Path) -> None:
    adapter, _, _ = saved(tmp_path)
    with pytest.raises(InputError, match=r"is an ATLAS adapter.*save_task_vector"):
        TaskVector.open(adapter)


def test_a_refused_vector_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Also where holders stand beside parameters already."""
    vector = vector_of(MODELS["vit"].model(), 0)
    vector["classifier.bias"][0] = torch.nan
    model = MODELS["vit"].model()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"'classifier\.bias' that are not finite"):
        get_peft_model(model, AtlasConfig(pool={"v": write_vector(tmp_path / "v.safetensors", vector)}))
    vector["classifier.bias"][0], vector["vit.embeddings.cls_token"][:] = 0, torch.inf
    with pytest.raises(ValueError, match="cls_token"):
        get_peft_model(model, AtlasConfig(pool={"v": write_vector(tmp_path / "v.safetensors", vector)}))
    assert [type(module) for module in model.modules()] == types
    assert not model.vit.embeddings._forward_pre_hooks


# Refusals ----------------------------------------------------------------------------------------------------------------


def test_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = vector_of(MODELS["mlp"].model(), 0)

    def pool(**changes: Tensor) -> dict[str, str]:
        tensors = {**values, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        return {"v": write_vector(tmp_path / "v.safetensors", tensors)}

    with pytest.raises(InputError, match=r"'v': 1 of its 7 tensors is a parameter of no layer of this model: other\.weight"):
        adapt("mlp", pool=pool(other__weight=torch.ones(2)))
    adapt("mlp", pool=pool(other__weight=torch.ones(2)), strict=False)
    with pytest.raises(InputError, match=r"'v': 1 tensor has another shape.*'head\.bias' is \[5\], in the model \[4\]"):
        adapt("mlp", pool=pool(head__bias=torch.ones(5)))
    with pytest.raises(ValueError, match=r"'v' has values in 'head\.bias' that are not finite"):
        adapt("mlp", pool=pool(head__bias=torch.full((4,), torch.nan)))
    with pytest.raises(ValueError, match="the pool has no task vectors"):
        adapt("mlp", pool={})
    with pytest.raises(ValueError, match=r"change none of the targeted parameters.*norm"):
        adapt("mlp", block_types=["norm"])
    with pytest.raises(ValueError, match=r"take 3,872 bytes in float32.*max_vector_bytes=100\. Use placement='disk'"):
        adapt("mlp", max_vector_bytes=100)
    adapt("mlp", max_vector_bytes=100, placement="disk")
    save_file(values, tmp_path / "whole.safetensors")
    with pytest.raises(InputError, match="is a whole model, and its base is not known"):
        adapt("mlp", pool={"whole": str(tmp_path / "whole.safetensors")})


def test_quantised_weights_take_vectors_of_low_rank_only() -> None:
    geometry = Geometry("linear", (8, 8), quantized=True)
    config = AtlasConfig(pool={"a": "x"}).for_layer("layer")

    class Opened:
        low = False

        def is_low_rank(self, block: str) -> bool:
            return self.low

    config.opened = Opened()
    with pytest.raises(ValueError, match=r"quantised.*Use LoRA"):
        AtlasDelta.check(geometry, config)
    config.opened.low = True
    AtlasDelta.check(geometry, config)
    config.granularity = "row"
    with pytest.raises(ValueError, match="quantised"):
        AtlasDelta.check(geometry, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "layer"}, r"granularity='layer' is not known. Accepted: 'task'"),
        ({"partition": 3}, "goes with granularity='partition'"),
        ({"granularity": "partition"}, "goes with granularity='partition'"),
        ({"granularity": "partition", "partition": 300}, "1 to 256"),
        ({"block_types": ["attention"]}, "block_types.*accepted are 'linear'"),
        ({"exclude_pool": ["x"]}, r"\['x'\] are not in the pool"),
        ({"init": {"x": 1.0}}, r"\['x'\] are not in the pool"),
        ({"fused_splits": {"weight": 0}}, "positive number of parts"),
        ({"placement": "moon"}, "placement='moon'"),
        ({"rank_pattern": {"x": 2}}, "composed weights have neither"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtlasConfig(pool={"a": "b"}, **fields)


def test_rows_that_cannot_be_split_and_sums_of_unlike_adapters() -> None:
    with pytest.raises(ValueError, match=r"head\.bias: fused_splits: its 4 rows cannot be divided into 3"):
        adapt("mlp", fused_splits={"head.bias": 3})
    model, _ = adapt("mlp")
    model.add_adapter("other", AtlasConfig(pool=pool_of(MODELS["mlp"]), granularity="row"))
    with pytest.raises(ValueError, match="no aTLAS adapter of either kind"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


# What a review found -----------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Wide layers whose biases are a thousandth of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_vectors_that_differ_in_biases_alone_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Deep()
    save_file(base.state_dict(), str(tmp_path / "base.safetensors"))
    for name, shift in (("a", 1.0), ("b", 2.0)):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            tuned.layers[1].bias.add_(shift)
        save_file(tuned.state_dict(), str(tmp_path / f"{name}.safetensors"))
    pool = {name: str(tmp_path / f"{name}.safetensors") for name in ("a", "b")}
    config = AtlasConfig(pool=pool, base=str(tmp_path / "base.safetensors"))
    model = get_peft_model(copy.deepcopy(base), config)
    (vectors,) = [d.vectors for n, d in deltas(model).items() if n == "layers.1.bias"]
    assert vectors is not None
    assert [round(float(v.part(0, 1, torch.zeros(1)))) for v in vectors if v is not None] == [1, 2]
    model.save_pretrained(str(tmp_path / "adapter"))
    swapped = AtlasConfig.from_pretrained(str(tmp_path / "adapter"))
    swapped.pool = {"a": pool["b"], "b": pool["a"]}
    with pytest.raises(ValueError, match=r"'a'.*is not the one that the coefficients were learned with"):
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"), config=swapped)


def test_a_tied_weight_may_have_two_names_in_two_vectors(tmp_path: Path) -> None:
    base: Any = MODELS["llama, tied"].model()
    shape = base.lm_head.weight.shape
    first, second = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    pool = {
        "a": write_vector(tmp_path / "a.safetensors", {"model.embed_tokens.weight": first}),
        "b": write_vector(tmp_path / "b.safetensors", {"lm_head.weight": second}),
    }
    model: Any = get_peft_model(base, AtlasConfig(pool=pool, init=1.0))
    for layer in dict(model.base_model.named_subspace_layers()).values():
        for container, (_, geometry) in layer.geometries.items():
            update = geometry.native(layer.dense_update(container, "default"))
            torch.testing.assert_close(update.detach(), first + second)


@pytest.mark.parametrize(
    "fields",
    [{"granularity": "row"}, {"granularity": "partition", "partition": 3}, {"fused_splits": {"embed_tokens.weight": 2}}],
    ids=str,
)
def test_a_tied_weight_is_not_composed_in_parts(fields: dict[str, Any]) -> None:
    pico = MODELS["llama, tied"]
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight are one tensor.*granularity='block'"):
        get_peft_model(pico.model(), AtlasConfig(pool=pool_of(pico), **fields))


class Rooted(nn.Module):
    """A parameter on the model itself, as timm's vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x + self.token)
        return found


def test_a_parameter_of_the_model_itself_is_refused_by_name(tmp_path: Path) -> None:
    vector = write_vector(tmp_path / "v.safetensors", {"token": torch.ones(8), "layer.bias": torch.ones(8)})
    with pytest.raises(ValueError, match=r"token.*stand on the model itself"):
        get_peft_model(Rooted(), AtlasConfig(pool={"v": vector}))
    model = get_peft_model(Rooted(), AtlasConfig(pool={"v": vector}, strict=False))
    assert list(deltas(model)) == ["layer.bias"]


def test_values_on_disk_must_be_finite_too(tmp_path: Path) -> None:
    vector = write_vector(tmp_path / "v.safetensors", {"layer.bias": torch.full((8,), torch.nan)})
    model = get_peft_model(Rooted(), AtlasConfig(pool={"v": vector}, placement="disk", init=1.0))
    with pytest.raises(InputError, match=r"'v' has values in 'layer.bias' that are not finite"):
        model(torch.ones(1, 8))


def test_a_base_made_in_inference_mode() -> None:
    pico = MODELS["mlp"]
    pool = pool_of(pico)
    expected = run(get_peft_model(pico.model(), AtlasConfig(pool=pool, init=0.1, **pico.targets)), pico.batch())
    with torch.inference_mode():
        model = get_peft_model(pico.model(), AtlasConfig(pool=pool, init=0.1, **pico.targets))
        found = run(model, pico.batch())
    assert torch.equal(found, expected)


def test_slips_in_names_of_parameters_are_named() -> None:
    for fields in (
        {"selected": {"typo.weight": ["task0"]}},
        {"tie_blocks": [["weight", "typo.weight"]]},
        {"fused_splits": {"typo.weight": 2}},
    ):
        with pytest.raises(ValueError, match=r"'?typo\.weight'?: selected, tie_blocks or fused_splits has it.*They are"):
            adapt("mlp", **fields)


def test_a_whole_model_of_another_base_and_the_base_itself_are_noticed(tmp_path: Path) -> None:
    pico = MODELS["bert"]
    for name, model in {"base": pico.model(), "tuned": fine_tuned(pico), "other": pico.model(seed=5)}.items():
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    base = str(tmp_path / "base")
    configs = {name: {"pool": {name: str(tmp_path / name)}, "base": base} for name in ("base", "tuned", "other")}
    with pytest.warns(UserWarning, match=r"'other' does not look like a fine-tuned .*base: the difference is 1\.[34]"):
        get_peft_model(pico.model(), AtlasConfig(**configs["other"]))
    get_peft_model(pico.model(), AtlasConfig(**configs["other"], strict=False))
    with pytest.warns(UserWarning, match=r"'base' is zero wherever it was looked at: is it .*base itself\?"):
        get_peft_model(pico.model(), AtlasConfig(**configs["base"]))
    get_peft_model(pico.model(), AtlasConfig(**configs["tuned"]))
    lora = get_peft_model(pico.model(), LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            parameter.mul_(100.0 if "lora_" in name else 1.0)
    lora.save_pretrained(tmp_path / "lora")  # an adapter may change its few weights as much as it likes
    get_peft_model(pico.model(), AtlasConfig(pool={"lora": {"path": str(tmp_path / "lora"), "base": base}}))


def test_a_lora_that_was_made_for_another_base_is_noticed(tmp_path: Path) -> None:
    pico = MODELS["bert"]
    plain = get_peft_model(pico.model(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    plain.save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "somebody/another"}))
    pool = {"lora": str(tmp_path / "lora")}
    with pytest.warns(UserWarning, match=r"'lora' says that it was made for 'somebody/another', and the .* 'me/base'"):
        get_peft_model(pico.model(), AtlasConfig(pool=pool, base="me/base"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": ["a"]}, "a table {name: place}"),
        ({"pool": {1: "a"}}, "a table {name: place}"),
        ({"exclude_pool": None}, "exclude_pool=None: a list of names"),
        ({"block_types": None}, "block_types=None: a list of kinds"),
        ({"strict": "no"}, "strict='no': True or False"),
        ({"init": True}, "init=True"),
        ({"partition_seed": "x"}, "partition_seed='x'"),
        ({"fused_splits": ["a"]}, "a table of a positive number of parts"),
        ({"tie_blocks": [[1]]}, "a list of lists of endings"),
        ({"selected": ["a"]}, "a table of the names of vectors"),
        ({"selected": {"x": "task0"}}, "a table of the names of vectors"),
        ({"pool": {"a": "b"}, "constraint": "softmax"}, "the share of 'a' alone would always be one"),
        ({"exclude_pool": "t1"}, "a list of names"),
        ({"init": float("nan")}, "init=nan: a finite number"),
        ({"init": "x"}, "init='x'"),
        ({"granularity": "partition", "partition": 2.5}, r"partition=2\.5"),
        ({"granularity": "partition", "partition": True}, "partition=True"),
        ({"tie_blocks": ["weight", "bias"]}, "a list of lists of endings"),
        ({"constraint": "positive"}, r"constraint='positive'.*'nonnegative', 'softmax'"),
        ({"constraint": "softmax", "selected": {}}, "would keep its share of one"),
        ({"tie_blocks": True}, "tie_blocks=True: a list of lists of endings"),
        ({"max_vector_bytes": "1GB"}, "max_vector_bytes='1GB'"),
    ],
)
def test_arguments_of_another_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtlasConfig(**{"pool": {"t1": "a"}, **fields})


def test_vectors_of_a_file_cannot_be_left_out_afterwards(tmp_path: Path) -> None:
    adapter, _, _ = saved(tmp_path)
    config = AtlasConfig.from_pretrained(str(adapter))
    config.exclude_pool = [config.vector_names[0]]
    with pytest.raises(ValueError, match=r"exclude_pool=.*the file has coefficients"):
        PeftModel.from_pretrained(MODELS["llama"].model(), str(adapter), config=config)


# What is used of a pool --------------------------------------------------------------------------------------------------


def test_blocks_of_selected_vectors(tmp_path: Path) -> None:
    """One vector for each block by the gradients at zero: the others are not read, and stay at zero, also in the file."""
    pico = MODELS["mlp"]
    model, batch = adapt(pico, init_weights=True, pool=pool_of(pico, None, 3))
    names = model.peft_config["default"].vector_names
    gradients = coefficient_gradients(model, [batch], lambda m, b: output(m, b).square().mean())
    selected = select_vectors(gradients, names, 1)
    assert set(selected) == set(gradients)
    for block, (name,) in selected.items():
        assert names.index(name) == int(gradients[block].abs().argmax())
    model, _ = adapt(pico, pool=pool_of(pico, None, 3), selected=selected)
    for block, delta in deltas(model).items():
        unused = [name not in selected[block] for name in names]
        assert [vector is None for vector in delta.vectors or []] == unused
        assert not delta.coefficients[unused].any()
        assert delta.coefficients[[not one for one in unused]].all()
    pool = model.peft_config["default"].opened.pool
    assert 3 * pool.nbytes(sorted(selected), selected) == pool.nbytes(sorted(selected))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico.model(), tmp_path)
    assert torch.equal(output(again.eval(), batch), output(model, batch))
    with pytest.raises(ValueError, match="budget=4: a number of vectors for each block is expected, from 1 to 3"):
        select_vectors(gradients, names, 4)
    with pytest.raises(ValueError, match=r"\['nowhere'\] are not in the pool"):
        AtlasConfig(pool={"a": "x"}, selected={"w": ["nowhere"]})
    with pytest.raises(ValueError, match=r"blocks that share coefficients .* share their vectors too"):
        AtlasConfig(pool={"a": "x"}, selected={"w": ["a"]}, granularity="task")


def test_factors_count_as_memory() -> None:
    """Two vectors of rank 2 on a matrix [16, 8], two biases of 16: 2 (2 (16 + 8) + 16) numbers of four bytes."""
    pico = LAYERS["linear"]
    model, _ = adapt(pico, pool=pool_of(pico, 2))
    rows, columns = pico.model().layer.weight.shape  # type: ignore[union-attr]
    needed = 4 * 2 * (2 * (rows + columns) + rows)
    assert model.peft_config["default"].opened.pool.nbytes(["layer.weight", "layer.bias"]) == needed
    adapt(pico, pool=pool_of(pico, 2), max_vector_bytes=needed)
    with pytest.raises(ValueError, match=f"take {needed:,} bytes"):
        adapt(pico, pool=pool_of(pico, 2), max_vector_bytes=needed - 1)


class Listed(nn.Module):
    """Parameters in containers that are indexed or iterated."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([torch.ones(8), torch.ones(8)])
        self.steps = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.steps.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x * self.gains[0]) + self.gains[1]
        return x + self.steps.shift  # type: ignore[operator]


def test_what_cannot_be_composed_is_left_out_by_name() -> None:
    pico = Pico(Listed, lambda: {"x": torch.randn(4, 8)})
    lost = "gains.0, gains.1, steps.shift"
    with pytest.raises(ValueError, match=rf"change \d parameters that cannot be composed: {lost} .* strict=False"):
        adapt(pico)
    model, batch = adapt(pico, strict=False)
    assert not {block for block in deltas(model) if block in lost.split(", ")}
    assert output(model, batch).isfinite().all()


def test_a_difference_from_another_base_is_refused(tmp_path: Path) -> None:
    """The pool's base is not the model: tau would be added to weights that it is no difference from."""
    pico = MODELS["bert"]
    base: Any = pico.model()
    base.save_pretrained(tmp_path / "base")
    whole: Any = pico.model()
    with torch.no_grad():
        whole.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    whole.save_pretrained(tmp_path / "whole")
    config = {"pool": {"w": str(tmp_path / "whole")}, "base": str(tmp_path / "base")}
    other: Any = pico.model(seed=9)
    with pytest.raises(InputError, match=r"'w' is a difference from .*base, and .* is another in the model .* strict=False"):
        get_peft_model(other, AtlasConfig(**config))
    get_peft_model(other, AtlasConfig(**config, strict=False))
    narrow: Any = type(base).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    get_peft_model(narrow, AtlasConfig(**config))
