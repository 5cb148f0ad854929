"""What only Concrete has: its mask in training and evaluation, folded vectors, files, and when a sample is drawn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_subspace import (
    AtlasConfig,
    ConcreteConfig,
    ConcreteDelta,
    draw_density,
    draw_history,
    draw_probabilities,
)
from peft_subspace.functional.composition import Dense, LowRank
from peft_subspace.functional.concrete_mask import concrete_sample, masked_sum
from peft_subspace.functional.noise import fingerprint, uniform
from peft_subspace.merging import merge
from peft_subspace.training import Look
from tests.pico import MODELS, Pico, loss, output, run, train
from tests.pools import pool_of, vector_of, write_vector
from tests.processes import peak_growth, run_python

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]


def adapt(name: str | Pico, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model with random logits on everything that the pool changes, and a batch."""
    pico = MODELS[name] if isinstance(name, str) else name
    config = ConcreteConfig(**{"pool": pool_of(pico), "init_weights": False, **fields})
    torch.manual_seed(3)
    return get_peft_model(pico.model(), config).eval(), pico.batch()


def deltas(model: Any, adapter: str = "default") -> dict[str, ConcreteDelta]:
    """Name of every parameter -> its Delta, of a tied one the first."""
    return {delta.block: delta for delta in model.base_model._deltas(adapter)}


def sampling(model: Any) -> Any:
    """The model as it is in training, without dropout of the base's own."""
    model.base_model.sample_mask(True)
    return model


# The update --------------------------------------------------------------------------------------------------------------


def test_a_new_adapter_is_task_arithmetic() -> None:
    pico = MODELS["vit"]
    concrete, batch = adapt("vit", init_weights=True, coefficients={"task0": 0.3, "task1": -0.2}, init=2.0)
    atlas = get_peft_model(pico.model(), AtlasConfig(pool=pool_of(pico), init={"task0": 0.3, "task1": -0.2})).eval()
    torch.testing.assert_close(run(concrete, batch), run(atlas, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_the_weight_and_its_gradients_are_those_of_the_published_formula(granularity: str) -> None:
    """Written out with PyTorch alone: sample, mean of each tensor, one mask for all vectors; the seed gives the noise."""
    pico = MODELS["mlp"]
    model, batch = adapt(pico, granularity=granularity, learn_coefficients="task", temperature=0.7, seed=5, save_mask="float32")
    model = sampling(model)
    vectors = [load_file(path) for path in pool_of(pico).values()]
    found = output(model, batch)
    own = deltas(model)
    leaves = {name: delta.logits.detach().clone().requires_grad_() for name, delta in own.items()}
    numbers = torch.full((2,), 0.3, requires_grad=True)
    state = {}
    for name, parameter in pico.model().named_parameters():
        salt = fingerprint(leaves[name].detach())
        u = uniform((5, name), 0, leaves[name].numel(), torch.device("cpu"), salt)
        mask = concrete_sample(leaves[name], u.view(leaves[name].shape), 0.7)
        if parameter.ndim == 2 and granularity != "element":
            mask = mask[:, None] if granularity == "row" else mask[None]
        delta = sum(n * vector[name] for n, vector in zip(numbers, vectors, strict=True))
        state[name] = parameter.detach() + masked_sum(delta, mask)  # type: ignore[arg-type]
    expected = output(lambda **x: torch.func.functional_call(pico.model(), state, (), x), batch)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(found)
    found.backward(grad)
    wanted = torch.autograd.grad(expected, [*leaves.values(), numbers], grad)
    for delta, gradient in zip((own[name] for name in leaves), wanted, strict=False):
        torch.testing.assert_close(delta.logits.grad, gradient, rtol=1e-4, atol=1e-6)
    (total,) = {id(d.trained[1]): d.trained[1].grad for d in own.values()}.values()
    torch.testing.assert_close(total, wanted[-1], rtol=1e-4, atol=1e-5)


def test_folding_fixed_coefficients_changes_nothing() -> None:
    """Straight equality of the folded form (fixed) and the unfolded one (trained) with the same numbers."""
    folded, batch = adapt("bert", coefficients={"task0": 0.4, "task1": 0.7})
    unfolded, _ = adapt("bert", coefficients={"task0": 0.4, "task1": 0.7}, learn_coefficients="layer")
    assert all(delta.folded is not None and len(delta.vectors or ()) == 1 for delta in deltas(folded).values())
    assert all(delta.folded is None and len(delta.vectors or ()) == 2 for delta in deltas(unfolded).values())
    assert torch.equal(run(sampling(folded), batch), run(sampling(unfolded), batch))


def test_vectors_of_low_rank_stay_so_when_they_are_folded() -> None:
    pico = MODELS["llama"]
    model, batch = adapt("llama", pool=pool_of(pico, 2), coefficients=0.5)
    found = deltas(model)["model.layers.0.mlp.up_proj.weight"]
    (vector,) = found.vectors or [None]
    assert isinstance(vector, LowRank)
    assert vector.rank == 4
    dense, _ = adapt("llama", pool=pool_of(pico, 2), coefficients=0.5, learn_coefficients="layer")
    torch.testing.assert_close(run(model, batch), run(dense, batch), rtol=1e-4, atol=1e-5)


def test_the_base_is_not_touched() -> None:
    """The official code adds to the base's tensors in place where they lie on the device of the coefficients."""
    model, batch = adapt("vit", learn_coefficients="task")
    pico = MODELS["vit"]
    train(model, batch)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), run(pico.model(), batch))


def test_hard_masks_keep_or_drop_entries() -> None:
    model, _ = adapt("mlp", eval_mask="hard", rescale=False, coefficients=1.0)
    for name, delta in deltas(model).items():
        tau = sum(load_file(path)[name] for path in pool_of(MODELS["mlp"]).values())
        merged = delta._dense()
        torch.testing.assert_close(merged, torch.where(delta.logits >= 0, tau, 0.0))  # type: ignore[arg-type]
        assert model.base_model.density()[name] == pytest.approx(float((delta.logits >= 0).float().mean()))


def test_density_is_what_is_let_through_not_what_is_dropped() -> None:
    """The official code calls the mean of a mask its sparsity."""
    model, _ = adapt("mlp", init_weights=True, init=2.0)
    assert all(value == pytest.approx(0.8808, abs=1e-4) for value in model.base_model.density().values())
    assert {name: tuple(p.shape) for name, p in model.base_model.mask_probabilities().items()} == {
        name: tuple(p.shape) for name, p in MODELS["mlp"].model().named_parameters()
    }


def test_a_tied_weight_has_one_mask() -> None:
    model, batch = adapt("llama, tied")
    embedding, head = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert head.concrete_delta["default"].trained[0] is embedding.concrete_delta["default"].logits
    train(model, batch)
    assert torch.equal(*(layer.get_delta_weight("default") for layer in (embedding, head)))


# Samples -----------------------------------------------------------------------------------------------------------------


def test_one_sample_serves_until_the_optimizer_steps() -> None:
    """All tasks and micro-batches of a step, and both levels of a bi-level step, see one mask."""
    model, batch = adapt("mlp")
    model.train()
    first = output(model, batch).detach()
    assert torch.equal(output(model, batch).detach(), first)
    before = model.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    loss(model, batch).backward()
    optimizer.step()
    second = output(model, batch).detach()
    assert float((second - first).abs().max()) > 1e-3, "a tiny step, and another sample"
    assert torch.equal(output(copy.deepcopy(model), batch).detach(), second)
    model.load_state_dict(kept)
    assert torch.equal(output(model, batch).detach(), first), "the sample belongs to the logits"


def test_seeds_reproduce_and_differ() -> None:
    runs = {}
    for seed in (1, 1, 2):
        model, batch = adapt("mlp", seed=seed)
        runs.setdefault(seed, []).append(train(model, batch))
    assert runs[1][0] == runs[1][1]
    assert runs[1][0] != runs[2][0]


def test_evaluation_draws_nothing_unless_it_is_asked_to() -> None:
    model, batch = adapt("mlp")
    mean = run(model, batch)
    assert torch.equal(run(model.train().eval(), batch), mean)
    sampled, _ = adapt("mlp", eval_mask="sample", seed=3)
    first = run(sampled, batch)
    assert not torch.equal(first, mean)
    assert torch.equal(run(sampled.train().eval(), batch), first)
    other, _ = adapt("mlp", eval_mask="sample", seed=4)
    assert not torch.equal(run(other, batch), first)


def test_a_merged_model_is_no_sample() -> None:
    """Merged in training mode too."""
    model, batch = adapt("mlp")
    expected = run(model, batch)
    merged = model.train().merge_and_unload().eval()
    torch.testing.assert_close(run(merged, batch), expected, rtol=1e-6, atol=1e-6)


def test_logits_must_not_change_between_forward_and_backward() -> None:
    model, batch = adapt("mlp")
    value = loss(model.train(), batch)
    with torch.no_grad():
        deltas(model)["first.weight"].logits.add_(1)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"first\.weight: the logits .* changed between forward and backward"):
        value.backward()


def test_a_sampled_mask_learns() -> None:
    """The loss of the mean mask falls when samples are trained."""
    model, batch = adapt("llama", init_weights=True, coefficients=1.0)
    before = float(loss(model.eval(), batch).detach())
    train(model, batch, steps=30, lr=0.1)
    assert float(loss(model.eval(), batch).detach()) < before - 0.01


def test_freezing_the_mask_leaves_the_coefficients(tmp_path: Path) -> None:
    model, batch = adapt("mlp", learn_coefficients="task")
    expected = run(model, batch)
    model.base_model.freeze_mask()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 1
    assert all(name.endswith("coefficients") for name in trained)
    assert torch.equal(output(model.train(), batch).detach(), expected), "no sample is drawn"
    train(model, batch)
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not torch.equal(run(model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(MODELS["mlp"].model(), tmp_path, is_trainable=True)
    assert torch.equal(run(loaded.eval(), batch), run(model, batch))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    assert torch.equal(output(loaded.train(), batch).detach(), run(model, batch)), "the mask stays frozen"


def test_coefficients_are_kept_in_their_range() -> None:
    model, batch = adapt("mlp", learn_coefficients="task", coefficients={"task0": 1.5, "task1": 0.5})
    loss(model, batch).backward()
    (tensor,) = {id(d.trained[1]): d.trained[1] for d in deltas(model).values()}.values()
    assert tensor.grad is not None
    assert float(tensor.grad[0]) == 0.0 != float(tensor.grad[1])
    assert all(value.tolist() == [1.0, 0.5] for value in model.base_model.coefficients().values())
    free, _ = adapt("mlp", learn_coefficients="task", coefficients=1.5, clamp_coefficients=False)
    assert all(value.tolist() == [1.5, 1.5] for value in free.base_model.coefficients().values())


# Files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "dtype", "share"),
    [
        ({}, torch.float32, 4.0),
        ({"save_mask": "bfloat16"}, torch.bfloat16, 2.0),
        ({"save_mask": "hard", "eval_mask": "hard"}, torch.uint8, 1 / 8),
    ],
    ids=["float32", "bfloat16", "hard"],
)
def test_a_file_holds_what_was_asked_for_and_gives_the_same_bits(
    fields: dict[str, Any], dtype: torch.dtype, share: float, tmp_path: Path
) -> None:
    model, batch = adapt("llama", **fields)
    train(model, batch)
    expected = run(model, batch)
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    masks = [tensor for name, tensor in tensors.items() if not name.endswith("coefficients")]
    assert {tensor.dtype for tensor in masks} == {dtype}
    size = sum(parameter.numel() for parameter in MODELS["llama"].model().parameters())
    assert sum(tensor.nbytes for tensor in masks) == pytest.approx(share * size, rel=0.02)
    loaded = PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path))
    assert torch.equal(run(loaded, batch), expected)
    assert torch.equal(run(copy.deepcopy(loaded), batch), expected)
    loaded.save_pretrained(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["bfloat16", "hard"])
def test_a_smaller_file_is_chosen_at_the_end(kind: str, tmp_path: Path) -> None:
    model, batch = adapt("llama")
    train(model, batch)
    before = run(model, batch)
    model.base_model.save_mask_as(kind)
    expected = run(model, batch)
    assert not torch.equal(before, expected), "the model evaluates by what the file will have"
    model.save_pretrained(str(tmp_path))
    assert torch.equal(run(PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path)), batch), expected)
    with pytest.raises(ValueError, match="save_mask='bits' is not known"):
        model.base_model.save_mask_as("bits")


def test_the_evaluation_mask_of_a_model_that_runs_can_be_changed(tmp_path: Path) -> None:
    model, batch = adapt("llama")
    train(model, batch)
    found = {}
    for kind in ("mean", "sample", "hard"):
        model.base_model.set_eval_mask(kind)
        found[kind] = run(model, batch)
        model.save_pretrained(str(tmp_path / kind))
        assert torch.equal(run(PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path / kind)), batch), found[kind])
    assert not torch.equal(found["mean"], found["sample"])
    assert not torch.equal(found["mean"], found["hard"])
    with pytest.raises(ValueError, match="eval_mask='soft' is not known"):
        model.base_model.set_eval_mask("soft")
    model.base_model.set_eval_mask("hard")
    model.base_model.save_mask_as("hard")
    with pytest.raises(ValueError, match="save_mask='hard' keeps their signs alone"):
        model.base_model.set_eval_mask("mean")


def test_a_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    model, batch = adapt("llama", eval_mask="sample")
    train(model, batch)
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(run(model, batch), tmp_path / "expected.pt")
    run_python(
        "import sys, torch\n"
        "import peft_subspace\n"
        "from peft import PeftModel\n"
        "from tests.pico import MODELS, run\n"
        "pico = MODELS['llama']\n"
        "model = PeftModel.from_pretrained(pico.model(), sys.argv[1] + '/adapter')\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "assert torch.equal(run(model, pico.batch()), expected)\n",
        tmp_path,
    )


def test_a_packed_mask_is_not_trained_further(tmp_path: Path) -> None:
    model, _ = adapt("mlp", save_mask="hard", eval_mask="hard")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(MODELS["mlp"].model(), str(tmp_path), is_trainable=True)
    assert not [name for name, p in loaded.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="has no logits to save as 'float32'"):
        loaded.base_model.save_mask_as("float32")  # type: ignore[union-attr, operator]
    probabilities = loaded.base_model.mask_probabilities()  # type: ignore[union-attr, operator]
    assert all(set(value.unique().tolist()) <= {0.0, 1.0} for value in probabilities.values())


def test_learned_coefficients_are_loaded_and_folded_anew(tmp_path: Path) -> None:
    """A file with other fixed coefficients than the config's start."""
    model, batch = adapt("mlp", coefficients=0.3)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(MODELS["mlp"].model(), str(tmp_path))
    for name in pool_of(MODELS["mlp"]):
        loaded.peft_config["default"].coefficients = {name: 9.0}  # type: ignore[attr-defined]
    assert torch.equal(run(loaded, batch), run(model, batch))


# Memory ------------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Two large layers."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


MEMORY = """
import sys, torch
from peft import get_peft_model
from peft_subspace import ConcreteConfig
from tests.adapters.test_concrete import Wide
torch.set_num_threads(1)
def held():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status if ":" in line)
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")} if "VmHWM" in lines else None
pool = {f"v{t}": f"{sys.argv[1]}/{t}.safetensors" for t in range(int(sys.argv[2]))}
model = Wide()
x = torch.randn(4, 1024)
model(x).sum().backward()
warm = torch.optim.Adam(model.parameters(), lr=0.0)  # what its first step imports is not the adapter's
warm.step()
del warm
model.zero_grad()
before = held()
model = get_peft_model(model.requires_grad_(False), ConcreteConfig(pool=pool)).train()
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(2):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
after = held()
print(None if before is None else after["VmHWM"] - before["VmRSS"])
"""


def test_memory_of_a_step_is_the_stated_budget_whatever_the_number_of_vectors(tmp_path: Path) -> None:
    """24 bytes an entry (logits, gradient, two moments, the folded vector, the composed weight), 12 of the largest in work,
    and 4 of it that stay for the next call."""
    for t in range(6):
        write_vector(tmp_path / f"{t}.safetensors", {f"{n}.weight": 0.01 * torch.randn(1024, 1024) for n in "ab"})
    one, six = (peak_growth(MEMORY, tmp_path, count) for count in (1, 6))
    entries, largest = 2 * 2**20, 2**20
    assert six < one + 2**20  # five vectors more, 8 MB each, leave nothing behind
    assert six < 24 * entries + 16 * largest


# For other methods -------------------------------------------------------------------------------------------------------


def test_a_mask_serves_other_methods(tmp_path: Path) -> None:
    """Masked vectors are files: for task arithmetic and TIES by a recipe, and for coefficients of aTLAS."""
    pico = MODELS["llama"]
    pico.model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model, batch = adapt("llama", coefficients={"task0": 0.4, "task1": 0.8})
    paths = model.base_model.save_masked_vectors(tmp_path / "masked")
    atlas = get_peft_model(pico.model(), AtlasConfig(pool=paths, init={"task0": 0.4, "task1": 0.8})).eval()
    torch.testing.assert_close(run(atlas, batch), run(model, batch), rtol=1e-4, atol=1e-5)
    models = [
        {"model": path, "parameters": {"weight": weight}} for path, weight in zip(paths.values(), (0.4, 0.8), strict=True)
    ]
    for method in ("task_arithmetic", "ties"):
        table = {"merge_method": method, "base_model": str(tmp_path / "base"), "models": models}
        table["parameters"] = {"normalize": False, "density": 0.9} if method == "ties" else {"normalize": False}
        merge(table, tmp_path / method)
        found = type(pico.model()).from_pretrained(tmp_path / method)  # type: ignore[attr-defined]
        if method == "task_arithmetic":
            torch.testing.assert_close(run(found, batch), run(model, batch), rtol=1e-4, atol=1e-5)


def test_a_mask_of_directions_has_no_masked_vectors(tmp_path: Path) -> None:
    model, _ = adapt("llama", pool=pool_of(MODELS["llama"], 2), granularity="rank")
    with pytest.raises(ValueError, match="granularity='rank' masks directions"):
        model.base_model.save_masked_vectors(tmp_path)


def test_pictures(tmp_path: Path) -> None:
    model, _ = adapt("llama")
    draw_density(model.base_model.density(), tmp_path / "density.png")
    draw_probabilities(model.base_model.mask_probabilities(), tmp_path / "probabilities.png")
    looks = [Look("mask", 0, {"a": 1.0}, {"accuracy": 0.5}), Look("mask", 5, {"a": 0.9}, {"accuracy": 0.6})]
    draw_history([*looks, Look("coefficients", 0, {"a": 0.9}), Look("coefficients", 5, {"a": 0.8})], tmp_path / "history.png")
    for name in ("density", "probabilities", "history"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as a history.json"),
        ("[]", "has no looks"),
        ('{"a": 1}', "is no history"),
        ('[{"phase": "mask"}]', "is no history of MergeTrainer, a list of looks"),
    ],
)
def test_what_is_no_history_is_said(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json: {message}"):
        draw_history(tmp_path / "x.json", tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"nothing\.json: cannot be read"):
        draw_history(tmp_path / "nothing.json", tmp_path / "x.png")


def test_two_adapters_with_other_files_under_one_name_keep_to_their_own(tmp_path: Path) -> None:
    pico = MODELS["mlp"]
    paths = [write_vector(tmp_path / f"{k}.safetensors", vector_of(pico.model(), k)) for k in range(2)]
    for learned in (None, "task"):
        model, batch = adapt("mlp", pool={"a": paths[0]}, learn_coefficients=learned, init_weights=True)
        alone, _ = adapt("mlp", pool={"a": paths[1]}, learn_coefficients=learned, init_weights=True)
        model.add_adapter("two", ConcreteConfig(pool={"a": paths[1]}, learn_coefficients=learned))
        model.set_adapter("two")
        assert torch.equal(run(model.eval(), batch), run(alone, batch))


# What is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be a positive number"),
        ({"init": float("inf")}, "init=inf: a finite number"),
        ({"granularity": "head"}, "granularity='head' is not known. Accepted: 'element', 'row'"),
        ({"eval_mask": "binary"}, "eval_mask='binary' is not known"),
        ({"save_mask": "bits"}, "save_mask='bits' is not known"),
        ({"save_mask": "hard"}, "save_mask='hard' keeps which logits .* Set eval_mask='hard'"),
        ({"learn_coefficients": "block"}, "learn_coefficients='block' is not known"),
        ({"coefficients": {"nobody": 1.0}}, r"\['nobody'\] are not in the pool"),
        ({"coefficients": float("nan")}, "coefficients=nan: a finite number"),
        ({"dropout": 0.1}, "dropout=0.1.* Leave them out"),
        ({"block_types": ["dense"]}, "block_types=.*accepted are 'linear'"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConcreteConfig(pool={"a": "somewhere"}, **fields)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="the pool has no task vectors"):
        get_peft_model(MODELS["mlp"].model(), ConcreteConfig(target_modules=["first"]))


def test_another_pool_is_refused_by_name(tmp_path: Path) -> None:
    pico = MODELS["mlp"]
    path = write_vector(tmp_path / "a.safetensors", vector_of(pico.model(), 0))
    model, _ = adapt("mlp", pool={"a": path})
    model.save_pretrained(str(tmp_path / "adapter"))
    write_vector(tmp_path / "a.safetensors", vector_of(pico.model(), 1))
    with pytest.raises(ValueError, match="'a'"):
        PeftModel.from_pretrained(pico.model(), str(tmp_path / "adapter"))


def test_float16_vectors_keep_small_values(tmp_path: Path) -> None:
    small = vector_of(MODELS["mlp"].model(), 0, scale=1e-6)
    path = write_vector(tmp_path / "small.safetensors", small)
    model, _ = adapt("mlp", pool={"a": path}, coefficients=1.0, vector_dtype="float16", init_weights=True)
    for name, delta in deltas(model).items():
        run(model, MODELS["mlp"].batch())
        (vector,) = delta.vectors or [None]
        assert isinstance(vector, Dense)
        torch.testing.assert_close(delta._dense().detach(), small[name], rtol=2e-3, atol=1e-9)
