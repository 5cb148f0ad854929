"""Adapters as deltas: equal to what PEFT merges into the model, for every option that is accepted; the others by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_subspace
from peft_subspace.adapters.flora import default_scale
from peft_subspace.base.geometry import describe
from peft_subspace.task_vectors.adapters import default_flora_scale
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.headers import read_header
from peft_subspace.task_vectors.reading import DeltaReader, Reader
from peft_subspace.task_vectors.renaming import names_in_memory
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.pico import LAYERS, MODELS, Pico


def save_model(model: nn.Module, folder: Path) -> Path:
    """A checkpoint of any module."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def adapted(
    pico: Pico, config: peft.PeftConfig, folder: Path, embeddings: bool = False
) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    """Base and adapter on disk, and the values of the base and of the model that PEFT merges."""
    model = pico.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = save_model(model, folder / "base")
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.3
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    return base, folder / "adapter", before, wrapped.merge_and_unload().state_dict()


def check(base: Path, adapter: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> TaskVector:
    """The task vector is what merging changed, and nothing else was changed."""
    vector = TaskVector.open(adapter, base)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    stored = read_header(base / "model.safetensors").tensors
    config = json.loads((base / "config.json").read_text()) if (base / "config.json").exists() else {}
    in_file = names_in_memory(stored, config) or {name: name for name in stored}
    assert {name for name in vector if vector[name].any()} == {in_file[key] for key in changed if key in in_file}
    for name, key in in_file.items():
        if key in vector.shapes:
            torch.testing.assert_close(before[name] + vector[key], after[name], rtol=1e-5, atol=1e-6)
    return vector


LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"q_proj": 9, "layers.0.mlp.up_proj": 5},
            "use_rslora": True,
        },
    ),
    "embeddings": ("llama", {"r": 3, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tied": ("llama, tied", {"r": 3, "target_modules": ["q_proj"]}),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D and Linear": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "wte"]}),
    "head": ("bert", {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "biases": ("bert", {"r": 4, "target_modules": ["query"], "bias": "lora_only"}),
    "conv": ("vit", {"r": 4, "target_modules": ["projection", "q_proj"]}),
    "conv net": ("conv", {"r": 4, "target_modules": ["stem", "pointwise", "head"]}),
    "mlp": ("mlp", {"r": 4, "target_modules": ["first", "second"]}),
    "experts": (
        "moe",
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "DoRA": ("llama", {"r": 4, "lora_alpha": 6, "use_dora": True, "rank_pattern": {"q_proj": 2}}),
    "DoRA, Conv1D": ("gpt2", {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "DoRA, embeddings": ("llama", {"r": 3, "use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    "DoRA, conv net": ("conv", {"r": 4, "use_dora": True, "target_modules": ["stem", "pointwise", "head"]}),
}


@pytest.mark.parametrize("case", LORA)
def test_lora_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    model, options = LORA[case]
    options = {"target_modules": MODELS[model].targets["target_modules"], "fan_in_fan_out": model == "gpt2", **options}
    check(*adapted(MODELS[model], peft.LoraConfig(**options), tmp_path))


FLORA = [
    "mlp",
    "conv",
    "mha",
    "mha, other keys",
    "encoder",
    "llama",
    "llama, tied",
    "gpt2",
    "bert",
    "vit",
    "resnet",
    "t5",
    "moe",
]


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`", "ignore:Input and output embeddings")
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("case", FLORA)
def test_flora_is_what_peft_merges(case: str, scale: float | None, tmp_path: Path) -> None:
    config = peft_subspace.FloraConfig(r=2, init_weights=False, scale=scale, **MODELS[case].targets)
    check(*adapted(MODELS[case], config, tmp_path))


SVFIT = [case for case in FLORA if case not in ("moe", "conv")]  # stacks of matrices are refused, see below


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`", "ignore:Input and output embeddings")
@pytest.mark.parametrize("options", [{"r": 2}, {"r": 3, "save_basis": False, "scale": "relative", "nonnegative": True}])
@pytest.mark.parametrize("case", SVFIT)
def test_svfit_is_what_peft_merges(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = peft_subspace.SvfitConfig(basis_dtype="float32", init_weights=False, **options, **MODELS[case].targets)
    vector = check(*adapted(MODELS[case], config, tmp_path))
    ranks = {vector.rank(name) for name in vector}
    assert ranks <= {1, 2, 3, None}
    assert ranks & {2, 3}


@pytest.mark.parametrize("case", ["moe", "conv"])
def test_svfit_on_stacks_of_matrices_is_refused(case: str, tmp_path: Path) -> None:
    config = peft_subspace.SvfitConfig(r=2, init_weights=False, **MODELS[case].targets)
    base, adapter, *_ = adapted(MODELS[case], config, tmp_path)
    with pytest.raises(InputError, match=r"adapted as a stack of matrices.*merge_and_unload"):
        TaskVector.open(adapter, base)


def test_svfit_without_a_base_or_on_another_one(tmp_path: Path) -> None:
    config = peft_subspace.SvfitConfig(r=2, save_basis=False, **MODELS["llama"].targets)
    base, adapter, *_ = adapted(MODELS["llama"], config, tmp_path)
    with pytest.raises(InputError, match="made of the base's own weight: name the base"):
        TaskVector.open(adapter)
    tensors = load_file(base / "model.safetensors")
    save_file({name: torch.randn_like(value) for name, value in tensors.items()}, base / "model.safetensors")
    with pytest.raises(InputError, match=r"base with other bits: the singular values differ.*keep_basis"):
        TaskVector.open(adapter, base).norm()


LAYER_CASES = [name for name in LAYERS if "scaled" not in name and "transposed" not in name]


@pytest.mark.parametrize("case", LAYER_CASES)
def test_flora_on_every_layer(case: str, tmp_path: Path) -> None:
    pico = LAYERS[case]
    scale = {} if case == "experts" else {"scale_pattern": {"layer": 1.5}}
    config = peft_subspace.FloraConfig(r=2, init_weights=False, **scale, **pico.targets)
    check(*adapted(pico, config, tmp_path))


@pytest.mark.parametrize("case", LAYER_CASES)
def test_the_default_scale_is_floras(case: str) -> None:
    module: Any = LAYERS[case].model()
    for parameter in (None, "experts") if case == "experts" else (None,):
        for name, geometry in describe(module.layer, parameter).items():
            ranks = [2] * len(geometry.shape)
            bare = parameter is not None or name != "weight"
            found = default_flora_scale(geometry.shape, ranks, geometry.kind == "embedding", bare)
            assert found == pytest.approx(default_scale(geometry, ranks))


def test_batch_norm_statistics_belong_to_the_adapter(tmp_path: Path) -> None:
    pico = MODELS["batch norm"]
    model = pico.model()
    base = save_model(model, tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft_subspace.FloraConfig(r=2, init_weights=False, **pico.targets))
    wrapped.train()
    for _ in range(3):
        wrapped(**pico.batch())
    wrapped.save_pretrained(tmp_path / "adapter")
    mean = wrapped.merge_and_unload().state_dict()["norm.running_mean"]
    vector = TaskVector.open(tmp_path / "adapter", base)
    torch.testing.assert_close(vector["norm.running_mean"], mean)  # the base's are zero


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lora_bias": True}, "biases on B"),
        ({"trainable_token_indices": [1, 2]}, "trained single tokens"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "replicated layers"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    base, adapter, *_ = adapted(MODELS["llama"], config, tmp_path)
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**table, **options}))
    with pytest.raises(InputError, match=rf"uses {name}.*merge_and_unload"):
        TaskVector.open(adapter, base)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_the_embedding_that_peft_stores_beside_its_lora_counts(tmp_path: Path) -> None:
    """By default it does; the weight below the LoRA may be another than the base's, as that of rows for new tokens."""
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"])
    parts = adapted(MODELS["llama"], config, tmp_path, embeddings=True)
    file = parts[1] / "adapter_model.safetensors"
    stored = load_file(file)
    (frozen,) = (key for key in stored if key.endswith("embed_tokens.base_layer.weight"))
    plain = check(*parts)["model.embed_tokens.weight"]
    stored[frozen][3] += 1
    save_file(stored, file)
    found = TaskVector.open(parts[1], parts[0])["model.embed_tokens.weight"]
    torch.testing.assert_close(found[3], plain[3] + 1)
    torch.testing.assert_close(found[4:], plain[4:])
    with pytest.raises(InputError, match=r"has whole modules .*embed_tokens.* name the base"):
        TaskVector.open(parts[1])


def test_a_lora_on_a_head_that_is_tied_changes_the_head_alone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        base, adapter, before, after = adapted(
            MODELS["llama, tied"], peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path
        )
    vector = TaskVector.open(adapter, base)
    assert list(vector) == ["lm_head.weight"]
    torch.testing.assert_close(vector["lm_head.weight"], after["lm_head.weight"] - before["lm_head.weight"])


class Experts(nn.Module):
    """Two stacks of matrices, `[experts, out, in]`, or `[experts, in, out]` where `is_transposed`."""

    def __init__(self, transposed: bool, width: int = 6) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up, self.down = (
            nn.Parameter(torch.randn(3, *(shape[::-1] if transposed else shape))) for shape in ((8, 6), (width, 8))
        )


class Stacks(nn.Module):
    """What transformers names as mixtures of experts do, in small."""

    def __init__(self, transposed: bool, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(transposed, width)}) for _ in range(2)])
        self.head = nn.Linear(6, 5)


def stacks(transposed: bool, width: int = 6) -> Pico:
    """That model as a pico model."""
    return replace(MODELS["mlp"], build=lambda: Stacks(transposed, width))


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": []}], ids=str)
def test_lora_on_bare_parameters_is_what_peft_merges(transposed: bool, options: dict[str, Any], tmp_path: Path) -> None:
    """Two stacks of one module: their updates are told apart by their shapes."""
    names = ["experts.up", "experts.down"] if transposed else ["experts.down"]
    pico = stacks(transposed, width=4 if transposed else 6)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["head"], "target_parameters": names, **options})
    vector = check(*adapted(pico, config, tmp_path))
    assert all(vector.rank(name) is None for name in vector if "experts" in name)
    reader, (name, *_) = Reader(), [name for name in vector if "experts" in name]
    whole = DeltaReader(vector.terms[0][1][name].deltas[0]).part(0, vector[name].numel(), reader, 0)
    pieces = DeltaReader(vector.terms[0][1][name].deltas[0])
    cut = [pieces.part(at, min(at + 7, whole.numel()), reader, 0) for at in range(0, whole.numel(), 7)]
    assert torch.equal(torch.cat(cut), whole)


def test_updates_of_bare_parameters_that_could_be_two_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
    base, adapter, *_ = adapted(stacks(False), config, tmp_path)  # down is [6, 8] and up [8, 6]
    with pytest.raises(InputError, match=r"its update fits 'layers\.0\.experts\.down'.*does not say which"):
        TaskVector.open(adapter, base)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down"])
    base, adapter, *_ = adapted(stacks(False, width=8), config, tmp_path / "square")
    with pytest.raises(InputError, match=r"is a stack of square matrices"):
        TaskVector.open(adapter, base)


@pytest.mark.parametrize("options", [{"use_dora": True, "target_modules": ["q_proj"]}], ids=["DoRA"])
def test_what_scales_the_base_needs_it(options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, *_ = adapted(MODELS["llama"], peft.LoraConfig(r=2, **options), tmp_path)
    with pytest.raises(InputError, match=r"is made of the base's own weight: name the base"):
        TaskVector.open(adapter)
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**table, "use_dora": False}))
    with pytest.raises(InputError, match=r"has lora_A, lora_B, lora_magnitude_vector; lora_A and lora_B are expected"):
        TaskVector.open(adapter, base)


def test_other_adapters_are_refused_by_name(tmp_path: Path) -> None:
    base, adapter, *_ = adapted(MODELS["llama"], peft.LoHaConfig(r=2, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(InputError, match=r"is a LOHA adapter.*Merge it into its model first"):
        TaskVector.open(adapter, base)
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace("LOHA", "PROMPT_TUNING"))
    with pytest.raises(InputError, match=r"is a PROMPT_TUNING adapter.*changes no weight, so there is nothing of it to merge"):
        TaskVector.open(adapter, base)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    _, adapter, *_ = adapted(MODELS["llama"], peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    base = save_model(MODELS["bert"].model(), tmp_path / "bert")
    with pytest.raises(InputError, match=r"adapts 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        TaskVector.open(adapter, base)


def test_a_rank_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    base, adapter, *_ = adapted(MODELS["llama"], peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**table, "r": 3}))
    with pytest.raises(InputError, match="do not fit its rank 3"):
        TaskVector.open(adapter, base)
    (adapter / "adapter_config.json").write_text(json.dumps({**table, "rank_pattern": {"(": 3}}))
    with pytest.raises(InputError, match="rank_pattern cannot be read"):
        TaskVector.open(adapter, base)


def test_a_low_rank_value_does_not_depend_on_the_range_it_is_asked_in(tmp_path: Path) -> None:
    base, adapter, *_ = adapted(MODELS["llama"], peft.LoraConfig(r=8, target_modules=["up_proj"]), tmp_path)
    vector = TaskVector.open(adapter, base)
    name = next(iter(vector))
    delta = vector.terms[0][1][name].deltas[0]
    reader = DeltaReader(delta)
    reader.rows = 5  # several blocks, the last one shorter
    whole = reader.part(0, 512, Reader(), 0)
    for step in (1, 7, 100, 511):
        pieces = [reader.part(start, min(start + step, 512), Reader(), 0) for start in range(0, 512, step)]
        assert torch.equal(torch.cat(pieces), whole)
