"""The algebra of task vectors, their file, what is measured, and the LoRA that is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_subspace.task_vectors.compare import compare
from peft_subspace.task_vectors.errors import InputError, OutputError, RecipeError
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.lora_files import json_bytes, safetensors_bytes, truncated
from peft_subspace.task_vectors.task_vector import TaskVector, count_conflicts
from peft_subspace.task_vectors.writing import entries_of, write_file
from tests.merging.tiny import near, trio, write
from tests.pico import MODELS, run


def lora(folder: Path, seed: int, rank: int = 2, layer: int = 1) -> Path:
    """A LoRA for the models of `trio`."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj"
    factors = {f"{prefix}.lora_A.weight": torch.randn(rank, 16), f"{prefix}.lora_B.weight": torch.randn(32, rank)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(factors, {}))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_bytes(json_bytes(config))
    return folder


def test_algebra(tmp_path: Path) -> None:
    models = trio(tmp_path)
    base = tmp_path / "base"
    a, b = TaskVector.open(tmp_path / "a", base), TaskVector.open(tmp_path / "b", base)
    both = 2 * a - b * 0.5 + (-a)
    for name in models["base"]:
        da, db = (models[letter][name] - models["base"][name] for letter in "ab")
        torch.testing.assert_close(both[name], da - 0.5 * db)
    flat_a = torch.cat([(models["a"][n] - t).flatten() for n, t in models["base"].items()]).double()
    flat_b = torch.cat([(models["b"][n] - t).flatten() for n, t in models["base"].items()]).double()
    assert a.norm() == pytest.approx(flat_a.norm().item(), rel=1e-6)
    assert a.cosine(b) == pytest.approx((flat_a @ flat_b / flat_a.norm() / flat_b.norm()).item(), abs=1e-6)
    assert a.cosine(-a) == pytest.approx(-1)
    assert a.sign_conflict(b) == pytest.approx(((flat_a * flat_b) < 0).double().mean().item())
    assert (0 * a).norm() == 0
    assert (0 * a).cosine(b) == 0
    halves = [a / 2, a * np.float32(0.5), np.float64(0.5) * a, a / np.int64(2), 0.5 * a, a * Fraction(1, 2)]
    for half in halves:
        assert (half - 0.5 * a).norm() == 0
    assert (sum([a, b, a]) - (2 * a + b)).norm() == pytest.approx(0, abs=1e-5)
    assert 0 + a is a
    wrong: list[Callable[[Any], Any]] = [
        lambda x: x + 1, lambda x: 1 + x, lambda x: x - 1, lambda x: x * True, lambda x: x * "2", lambda x: x / "2",
        lambda x: 2 / x, lambda x: x * x,
    ]  # fmt: skip
    for operation in wrong:
        with pytest.raises(TypeError):
            operation(a)
    with pytest.raises(ZeroDivisionError):
        a / 0


def test_low_rank_stays_of_low_rank(tmp_path: Path) -> None:
    trio(tmp_path)
    base = tmp_path / "base"
    paths = lora(tmp_path / "x", 0), lora(tmp_path / "y", 1, rank=3), lora(tmp_path / "z", 2, layer=0)
    x, y, z = (TaskVector.open(path, base) for path in paths)
    both = x - 2 * y + z
    name, other = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert (both.rank(name), both.rank(other), len(both)) == (5, 2, 2)
    left, right = both.factors(name)  # type: ignore[misc]
    torch.testing.assert_close(left @ right, both[name])
    torch.testing.assert_close(both[name], x[name] - 2 * y[name])
    dense = torch.cat([both[name].flatten(), both[other].flatten()]).double()
    assert both.norm() == pytest.approx(dense.norm().item(), rel=1e-5)
    assert both.cosine(x) == pytest.approx((both[name] * x[name]).sum().item() / (both.norm() * x.norm()), rel=1e-4)

    both.save(tmp_path / "tv.safetensors")
    with safe_open(tmp_path / "tv.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{n}::{part}" for n in (name, other) for part in "AB"}
    for again in (TaskVector.open(tmp_path / "tv.safetensors", base), TaskVector.open(tmp_path / "tv.safetensors")):
        assert again.rank(name) == 5
        torch.testing.assert_close(again[name], both[name])
    mixed = both + TaskVector.open(tmp_path / "a", base)
    assert mixed.rank(name) is None
    torch.testing.assert_close(mixed[name], both[name] + TaskVector.open(tmp_path / "a", base)[name])


def test_a_dense_vector_saves_and_opens(tmp_path: Path) -> None:
    trio(tmp_path)
    a = TaskVector.open(tmp_path / "a", tmp_path / "base")
    a.save(tmp_path / "tv.safetensors")
    again = TaskVector.open(tmp_path / "tv.safetensors", tmp_path / "base")
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert (a - again).norm() == 0
    a.save(tmp_path / "half.safetensors", torch.bfloat16)
    torch.testing.assert_close(
        TaskVector.open(tmp_path / "half.safetensors")["lm_head.weight"], a["lm_head.weight"], rtol=1e-2, atol=0
    )
    with pytest.raises(OutputError, match="cannot be written"):
        a.save(tmp_path / "nowhere" / "tv.safetensors")


def test_the_same_vector_gives_the_same_file(tmp_path: Path) -> None:
    """Whoever learned with a vector knows it by the hash of its file."""
    trio(tmp_path)
    lora(tmp_path / "x", 0)
    for vector in (TaskVector.open(tmp_path / letter, tmp_path / "base") for letter in "ax"):
        written = set()
        for number in range(4):
            vector.save(tmp_path / f"{number}.safetensors")
            written.add((tmp_path / f"{number}.safetensors").read_bytes())
        assert len(written) == 1


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def values() -> Iterator[torch.Tensor]:
        yield torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x.safetensors", entries_of({"a": torch.zeros(2), "b": torch.zeros(2)}), {}, values())
    assert not any(tmp_path.iterdir())


def test_what_does_not_fit(tmp_path: Path) -> None:
    models = trio(tmp_path)
    write(tmp_path / "base2", near(models["base"], 8))
    a, other = TaskVector.open(tmp_path / "a", tmp_path / "base"), TaskVector.open(tmp_path / "b", tmp_path / "base2")
    with pytest.raises(InputError, match="two bases"):
        a + other
    with pytest.raises(InputError, match="name the base that it was made from"):
        TaskVector.open(tmp_path / "a")
    with pytest.raises(InputError, match="two bases"):
        a - TaskVector.open(tmp_path / "b", tmp_path / "a")  # of the same header
    MODELS["bert"].model().save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match=r"has 0 of the \d+ tensors of .*of another architecture"):
        TaskVector.open(tmp_path / "bert", tmp_path / "base")


def test_one_base_by_several_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("base")
    shutil.copytree("base", "copy")
    a = TaskVector.open("a", "base")
    for other in (tmp_path / "base", "./base", "link", "copy", "base/model.safetensors"):
        both = a + TaskVector.open("b", other)
        torch.testing.assert_close(both["lm_head.weight"], a["lm_head.weight"] + TaskVector.open("b", "base")["lm_head.weight"])


def test_conflicts() -> None:
    vectors = [
        torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0]),
        torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0]),
        torch.tensor([2.0, 0.0, 0.0, 0.0, 1.0]),
    ]
    assert count_conflicts(vectors) == (2, 3)


def test_compare_is_one_pass_with_the_same_numbers(tmp_path: Path) -> None:
    trio(tmp_path)
    vectors = [TaskVector.open(tmp_path / name, tmp_path / "base") for name in "abc"]
    vectors.append(TaskVector.open(lora(tmp_path / "x", 0), tmp_path / "base"))
    seen: list[int] = []
    found = compare(vectors, list("abcx"), spectrum=True, progress=seen.append)
    assert found.norms == pytest.approx([vector.norm() for vector in vectors], rel=1e-5)
    assert found.cosines[0, 1].item() == pytest.approx(vectors[0].cosine(vectors[1]), abs=1e-6)
    assert found.sign_conflict == pytest.approx(vectors[0].sign_conflict(*vectors[1:]))
    assert found.density[0] == pytest.approx(1.0, abs=0.01)
    assert found.density[3] == pytest.approx(32 * 16 / found.count)
    assert list(found.blocks) == [
        "lm_head.weight",
        "model.embed_tokens",
        *(f"model.layers.{n}" for n in range(3)),
        "model.norm",
    ]
    assert sum(seen) == 4 * found.count
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found.spectra[name][0], torch.linalg.svdvals(vectors[0][name]))
    torch.testing.assert_close(
        found.spectra[name][3].float()[:2], torch.linalg.svdvals(vectors[3][name])[:2], rtol=1e-4, atol=1e-5
    )
    assert found.spectra["lm_head.weight"][3].numel() == 0


@pytest.mark.parametrize("low_rank", [False, True])
def test_no_spectrum_of_what_is_not_a_number(low_rank: bool, tmp_path: Path) -> None:
    models = trio(tmp_path)
    folder = lora(tmp_path / "x", 0) if low_rank else tmp_path / "a"
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if "layers.1.mlp.up_proj" in key)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file)
    vectors = [TaskVector.open(path, tmp_path / "base") for path in (folder, tmp_path / "b")]
    with pytest.raises(InputError, match=r"^mine: 'model\.layers\.1\.mlp\.up_proj\.weight' has .* no singular values"):
        compare(vectors, ["mine", "b"], spectrum=True)
    assert compare(vectors, ["mine", "b"]).count == sum(t.numel() for t in models["base"].values())


# Extraction ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2", "vit", "bert"])
def test_full_rank_gives_the_model_back(model: str, tmp_path: Path) -> None:
    """All weights that LoRA has a layer for are changed, and PEFT loads the adapter: the outputs are the same."""
    pico = MODELS[model]
    base, tuned = pico.model(), pico.model()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    skipped = ("wte", "wpe", "embed", "norm", "lm_head", "cls_token", "position", "ln_", "classifier", "LayerNorm")
    for name, parameter in tuned.named_parameters():
        if name.endswith("weight") and not any(part in name for part in skipped):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract_lora(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "out", rank=64)
    assert found.error < 1e-5
    assert not found.left_out
    loaded = peft.PeftModel.from_pretrained(pico.model(), tmp_path / "out")
    torch.testing.assert_close(run(loaded, pico.batch()), run(tuned, pico.batch()), rtol=1e-3, atol=1e-4)


def test_embeddings_are_extracted_too(tmp_path: Path) -> None:
    pico = MODELS["llama"]
    tuned = pico.model()
    pico.model().save_pretrained(tmp_path / "base")
    tuned.model.embed_tokens.weight.data += torch.randn(48, 2) @ torch.randn(2, 16)
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract_lora(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "out", rank=2)
    assert found.ranks == {"model.embed_tokens.weight": 2}
    assert found.error < 1e-5
    loaded = peft.PeftModel.from_pretrained(pico.model(), tmp_path / "out")
    torch.testing.assert_close(run(loaded, pico.batch()), run(tuned, pico.batch()), rtol=1e-3, atol=1e-4)


def test_the_error_is_reported_and_norms_are_left_out_by_name(tmp_path: Path) -> None:
    models = trio(tmp_path)
    found = extract_lora(str(tmp_path / "a"), str(tmp_path / "base"), tmp_path / "out", rank=3)
    left = TaskVector.open(tmp_path / "a", tmp_path / "base") - TaskVector.open(tmp_path / "out", tmp_path / "base")
    whole = TaskVector.open(tmp_path / "a", tmp_path / "base")
    assert found.error == pytest.approx(left.norm() / whole.norm(), rel=1e-4)
    assert set(found.left_out) == {name for name, tensor in models["base"].items() if tensor.ndim == 1}
    by_energy = extract_lora(str(tmp_path / "a"), str(tmp_path / "base"), tmp_path / "energy", energy=0.8)
    assert all(error <= 0.2**0.5 for error in by_energy.errors.values())
    assert json.loads((tmp_path / "energy" / "adapter_config.json").read_text())["r"] == max(by_energy.ranks.values())


def test_extraction_says_what_is_wrong(tmp_path: Path) -> None:
    trio(tmp_path)
    a, base = str(tmp_path / "a"), str(tmp_path / "base")
    with pytest.raises(RecipeError, match="give --rank"):
        extract_lora(a, base, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"--energy 1\.5"):
        extract_lora(a, base, tmp_path / "out", energy=1.5)
    with pytest.raises(InputError, match="no weight that LoRA has a layer for differs"):
        extract_lora(base, base, tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="already exists and holds"):
        extract_lora(a, base, tmp_path / "b", rank=2)


def test_a_randomised_svd_is_as_good_as_the_exact_one() -> None:
    torch.manual_seed(1)
    u, v = torch.linalg.qr(torch.randn(600, 520))[0], torch.linalg.qr(torch.randn(520, 520))[0]
    spectrum = torch.logspace(0, -2, 520)
    matrix = (u * spectrum) @ v.t()
    before = torch.get_rng_state()
    left, right, missed = truncated(matrix, 16, None)
    assert torch.equal(torch.get_rng_state(), before)
    best = (spectrum[16:].square().sum() / spectrum.square().sum()).item()
    assert best <= missed * (1 + 1e-6)
    assert missed <= best * 1.001
    again = truncated(matrix, 16, None)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])
