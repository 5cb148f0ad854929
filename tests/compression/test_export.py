"""Exported models: the same outputs, the official keys, transformers' own save and load, adapters on top, the original gone."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_subspace import FloraConfig, PelaConfig, SvfitConfig, compression_report, export_compressed, load_official
from peft_subspace.compression import LowRank, is_compressed
from tests.methods import METHODS
from tests.pico import LAYERS, MODELS, loss, run, train
from tests.processes import run_python

pytestmark = [
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]
HUGGING_FACE = ["llama", "llama, tied", "gpt2", "bert", "vit", "resnet", "t5", "moe"]


def trained(name: str, **fields: Any) -> Any:
    pico = (MODELS | LAYERS)[name]
    torch.manual_seed(1)
    model = get_peft_model(pico.model(), PelaConfig(**{"r": 2, **pico.targets, **fields}))
    if name in MODELS:
        train(model, pico.batch())
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", [*(n for n in LAYERS if n not in METHODS["PELA"].leaves), *MODELS])
def test_the_exported_model_computes_the_same(name: str) -> None:
    pico = (MODELS | LAYERS)[name]
    model, batch = trained(name), pico.batch()
    expected = run(model, batch)
    wrapped = dict(model.base_model.named_subspace_layers())
    own = [key for key, m in wrapped.items() if any(g.reads_own_weight for _, g in m.geometries.values())]
    weights = {
        key: layer._base_weight(c).detach() + g.native(layer.dense_update(c, "default").detach())
        for key, layer in wrapped.items() for c, (_, g) in layer.geometries.items()
    }  # fmt: skip
    weights = {
        key: weight.t() if type(wrapped[key].base_layer).__name__ == "Conv1D" else weight for key, weight in weights.items()
    }
    plain = export_compressed(model)
    torch.testing.assert_close(run(plain, batch), expected, rtol=1e-4, atol=1e-5)
    assert not any("pela" in key or "base_layer" in key for key in plain.state_dict())
    assert sum(isinstance(m, LowRank) for m in plain.modules()) == len(wrapped) - len(own)
    for key, dense in weights.items():
        if key not in own:
            torch.testing.assert_close(plain.get_submodule(key).weight, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "conv", "mha"])
def test_the_original_weights_are_gone(name: str) -> None:
    model = trained(name)
    originals = [weakref.ref(layer._locate(c)[0]._parameters[layer._locate(c)[1]])
                 for _, layer in model.base_model.named_subspace_layers() for c in layer.geometries]  # fmt: skip
    plain = export_compressed(model)
    del model
    gc.collect()
    assert originals
    assert not any(reference() is not None for reference in originals)
    assert plain is not None


def test_official_keys_and_back() -> None:
    """`<name>.0.weight` [k, in], `<name>.1.weight` [out, k], `<name>.1.bias`, in a Sequential that torch alone can load."""
    plain = export_compressed(trained("vit"))
    state = plain.state_dict()
    name = next(key.removesuffix(".0.weight") for key in state if key.endswith(".0.weight") and "q" in key.split(".")[-3])
    assert state[f"{name}.0.weight"].shape == (2, 16)
    assert state[f"{name}.1.weight"].shape == (16, 2)
    assert state[f"{name}.1.bias"].shape == (16,)
    assert f"{name}.0.bias" not in state
    hand = nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16))
    hand.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")})
    loaded = load_official(MODELS["vit"].model(seed=7), state)
    assert torch.equal(run(loaded, MODELS["vit"].batch()), run(plain, MODELS["vit"].batch()))
    with pytest.raises(ValueError, match="No layer of the state dict is in low-rank form"):
        load_official(MODELS["vit"].model(), MODELS["vit"].model().state_dict())
    with pytest.raises(ValueError, match="does not fit ViTForImageClassification"):
        load_official(MODELS["vit"].model(), {k: v for k, v in state.items() if "layernorm" not in k})


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_save_pretrained_and_from_pretrained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pico = MODELS[name]
    torch.manual_seed(1)
    model = get_peft_model(pico.model(dtype), PelaConfig(r=2, **pico.targets)).eval()
    plain: Any = export_compressed(model)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    expected = run(plain, pico.batch(dtype))
    plain.save_pretrained(str(tmp_path))
    loaded = type(plain).from_pretrained(str(tmp_path), dtype=dtype)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in loaded.state_dict().items())
    if (
        dtype == torch.float32
    ):  # a rotary embedding's frequencies are in no file, and `.to(bfloat16)` has rounded the first ones
        assert torch.equal(run(loaded.eval(), pico.batch(dtype)), expected)
    if name != "moe":  # whose experts are exported as dense products
        assert sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values()) < pico.model().num_parameters()
    again = tmp_path / "again"
    loaded.save_pretrained(str(again))
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert loaded.half().dtype == torch.float16, "it is no quantised model"


def test_another_class_of_the_architecture_and_a_fresh_process(tmp_path: Path) -> None:
    plain: Any = export_compressed(trained("bert"))
    plain.save_pretrained(str(tmp_path))
    inner = tf.AutoModel.from_pretrained(str(tmp_path))
    batch = MODELS["bert"].batch()
    hidden = inner.eval()(**batch).last_hidden_state
    torch.testing.assert_close(hidden, plain.bert(**batch).last_hidden_state)
    script = (
        "import sys, torch, peft_subspace, transformers\n"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "torch.save(model(input_ids=torch.load(sys.argv[1] + '/ids.pt')).logits.detach(), sys.argv[1] + '/out.pt')\n"
    )
    torch.save(batch["input_ids"], tmp_path / "ids.pt")
    run_python(script, tmp_path)
    assert torch.equal(torch.load(tmp_path / "out.pt"), run(plain, batch))


def test_without_the_package_transformers_warns_by_name(tmp_path: Path) -> None:
    """It offers no way to refuse: it says what it does not know, and that the weights of these layers are missing."""
    export_compressed(trained("bert")).save_pretrained(str(tmp_path))  # type: ignore[operator]
    said = run_python(
        "import sys\n"
        "sys.stderr = sys.stdout\n"
        "import transformers\n"
        "transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "assert 'peft_subspace' not in sys.modules\n",
        tmp_path,
    )
    assert "Unknown quantization type, got low_rank" in said
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["library"] == "peft_subspace"


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["query.0", "query.1"]),
        FloraConfig(r=2, target_modules=["query.0", "query.1"]),
        SvfitConfig(r=2, target_modules=["query.0", "query.1"]),
    ],
    ids=["LoRA", "FLoRA", "SVFit"],
)
def test_adapters_on_top(config: Any, tmp_path: Path) -> None:
    plain: Any = export_compressed(trained("bert"))
    plain.save_pretrained(str(tmp_path / "base"))
    batch = MODELS["bert"].batch()
    start = run(plain, batch)
    model = get_peft_model(copy.deepcopy(plain), copy.deepcopy(config))
    torch.testing.assert_close(run(model, batch), start)
    before = float(loss(model, batch).detach())
    train(model, batch, steps=6)
    assert float(loss(model, batch).detach()) < before
    model.save_pretrained(str(tmp_path / "adapter"))
    base = tf.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(run(loaded, batch), run(model, batch))
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(str(tmp_path / "merged"))
    reloaded = tf.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(run(reloaded, batch), run(merged, batch))


def test_trained_copies_take_the_place_of_the_originals() -> None:
    model, batch = trained("bert", train_norms=True, modules_to_save=["classifier"]), MODELS["bert"].batch()
    expected = run(model, batch)
    plain = export_compressed(model)
    torch.testing.assert_close(run(plain, batch), expected, rtol=1e-5, atol=1e-6)
    assert not any("modules_to_save" in key or "original_module" in key for key in plain.state_dict())


def test_a_tied_head_keeps_its_own_dense_weight(tmp_path: Path) -> None:
    pico = MODELS["llama, tied"]
    plain: Any = export_compressed(get_peft_model(pico.model(), PelaConfig(r=2, target_modules=["embed_tokens"])))
    assert isinstance(plain.get_input_embeddings(), LowRank)
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(str(tmp_path))
    loaded = tf.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(run(loaded, pico.batch()), run(plain, pico.batch()))


def masked_bert() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(tf.BertConfig(**sizes, vocab_size=48, max_position_embeddings=32)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    return model


def test_ties_of_a_masked_language_model(tmp_path: Path) -> None:
    """Its head's bias is tied as well, and both names must be in the file."""
    plain: Any = export_compressed(get_peft_model(masked_bert(), PelaConfig(r=2, target_modules=["word_embeddings"])))
    plain.save_pretrained(str(tmp_path))
    ids = {"input_ids": torch.randint(1, 48, (2, 5))}
    assert torch.equal(run(tf.AutoModelForMaskedLM.from_pretrained(str(tmp_path)), ids), run(plain, ids))


def test_a_class_without_one_of_the_layers_says_so(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["bert"].model(), PelaConfig(r=2, target_modules=["query", "pooler.dense"]))
    export_compressed(model).save_pretrained(str(tmp_path))  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"does not have these compressed layers: \['bert.pooler.dense'\]"):
        tf.AutoModelForMaskedLM.from_pretrained(str(tmp_path))


def test_everything_can_be_trained_afterwards_and_default_targets_fit() -> None:
    plain = export_compressed(trained("bert"))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    model = get_peft_model(plain, FloraConfig(r=2))
    assert sorted({key.split("self.")[1] for key, _ in model.base_model.named_subspace_layers()}) == [
        "query.0", "query.1", "value.0", "value.1",
    ]  # fmt: skip


def test_what_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is no PeftModel"):
        export_compressed(MODELS["llama"].model())
    t5 = get_peft_model(MODELS["t5"].model(), PelaConfig(r=2, target_modules=["q", "shared"]))
    with pytest.raises(ValueError, match="is tied to other embeddings of this encoder-decoder"):
        export_compressed(t5)
    model = trained("mlp")
    with pytest.raises(ValueError, match=r"no adapter 'bogus', only \['default'\]"):
        export_compressed(model, "bogus")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapters are merged into"):
        export_compressed(model)
    other = get_peft_model(MODELS["mlp"].model(), FloraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="adds to its base and needs it"):
        export_compressed(other)
    assert not is_compressed(MODELS["mlp"].model())


# The report --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "llama, tied", "conv", "mha", "t5"])
def test_the_report_says_what_the_export_does(name: str, tmp_path: Path) -> None:
    pico = MODELS[name]
    model, batch = trained(name, modules_to_save=None, task_type=None), pico.batch()
    report = compression_report(model, batch, rounds=1)
    assert report.before.parameters == sum(p.numel() for p in pico.model().parameters())
    assert report.before.bytes == 4 * report.before.parameters
    assert report.after.bytes == 4 * report.after.parameters
    for layer in report.layers:
        key = layer.name.removesuffix(".in_proj_weight").removesuffix(".out_proj.weight")
        wrapped = dict(model.base_model.named_subspace_layers())[key]
        container = next(
            c for c, (w, _) in wrapped.geometries.items() if len(wrapped.geometries) == 1 or layer.name.endswith(w)
        )
        weight, update = wrapped._canonical_weight(container), wrapped.dense_update(container, "default").detach()
        assert layer.error == pytest.approx(float(update.norm() / weight.norm()), rel=1e-5)
        assert layer.largest == pytest.approx(float(update.abs().max()), rel=1e-5)
    assert report.before.flops
    assert report.before.samples_per_second
    assert report.after.samples_per_second
    assert report.before.peak_bytes
    assert report.before.peak_bytes > report.before.bytes
    report.draw(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert [table.row_count for table in report.tables()][1] == len(report.layers)
    plain = export_compressed(model)
    assert report.after.parameters == sum(p.numel() for p in plain.parameters())
    if name not in ("mha", "llama, tied"):
        assert report.after.flops
        assert report.after.flops < report.before.flops


def test_a_report_without_a_batch_or_an_adapter() -> None:
    report = compression_report(trained("llama"))
    assert report.after.flops is None
    assert report.tables()[0].row_count == 2
    with pytest.raises(ValueError, match=r"no adapter 'bogus', only \['default'\]"):
        compression_report(trained("llama"), adapter_name="bogus")
