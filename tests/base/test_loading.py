"""An adapter file fits the model whole, or the model stays as it was and the message says what to do."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_subspace import FloraConfig
from tests.base.snapshot import mixed_model, unchanged
from tests.pico import MODELS, output

WEIGHTS = "adapter_model.safetensors"
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj"]},
    "bert": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    "batch norm": {"target_modules": ["stem"], "modules_to_save": ["head"]},
    "mha": MODELS["mha"].targets,
    "moe": MODELS["moe"].targets,
}
LAYER = "model.layers.0.self_attn.q_proj.flora_delta"  # of the llama


def saved_adapter(folder: Path, name: str = "llama", model: nn.Module | None = None) -> Path:
    """A folder with an adapter that changes the output."""
    torch.manual_seed(7)
    config = FloraConfig(r=2, init_weights=False, **TARGETS[name])
    get_peft_model(MODELS[name].model() if model is None else model, config).save_pretrained(str(folder))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def llama(**sizes: int) -> nn.Module:
    few = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**few, **sizes}))


def wider(folder: Path) -> None:
    saved_adapter(folder, model=llama(hidden_size=32))


def deeper(folder: Path) -> None:
    saved_adapter(folder, model=llama(num_hidden_layers=3))


FULL_KEY = f"base_model.model.{LAYER}"
FITS = ["flora adapter 'NAME' of this model", "base_model_name_or_path", "adapter_config.json", "model was left as it was"]
DAMAGED = [WEIGHTS, "Save or download the adapter again", "model was not changed"]
BAD_FILES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "another base": (wider, [f"8 of another shape: {LAYER}.factor_0 is [32, 2] in the file and [16, 2] in the model", *FITS]),
    "a deeper base": (
        deeper,
        ["6 unexpected: model.layers.2.self_attn.q_proj", f"nearest name in the model: {LAYER[:12]}", *FITS],
    ),
    "missing key": (partial(edit_tensors, change=lambda t: t.pop(f"{FULL_KEY}.core")), [f"1 missing: {LAYER}.core", *FITS]),
    "missing layer": (
        partial(edit_tensors, change=lambda t: [t.pop(key) for key in list(t) if "layers.1." in key]),
        ["6 missing: model.layers.1.self_attn.q_proj.flora_delta.core", "and 2 more", *FITS],
    ),
    "unexpected key": (
        partial(edit_tensors, change=lambda t: t.update({f"{FULL_KEY}.kore": torch.ones(2)})),
        [f"1 unexpected: {LAYER}.kore (nearest name in the model: {LAYER}.core)", *FITS],
    ),
    "renamed key": (
        partial(edit_tensors, change=lambda t: t.update({f"{FULL_KEY}.kore": t.pop(f"{FULL_KEY}.core")})),
        [f"1 missing: {LAYER}.core; 1 unexpected: {LAYER}.kore", *FITS],
    ),
    "empty of tensors": (partial(edit_tensors, change=lambda t: t.clear()), ["12 missing", *FITS]),
    "cut short": (partial(edit_bytes, change=lambda b: b[:-10]), ["cut short or damaged", *DAMAGED]),
    "cut in the header": (partial(edit_bytes, change=lambda b: b[:100]), ["cut short or damaged", *DAMAGED]),
    "cut to nothing": (partial(edit_bytes, change=lambda b: b""), ["cut short or damaged", *DAMAGED]),
    "longer": (partial(edit_bytes, change=lambda b: b + b"more"), ["cut short or damaged", *DAMAGED]),
    "damaged header": (
        partial(edit_bytes, change=lambda b: b[:40] + b"\xff\xfe\x00" + b[43:]),
        ["cut short or damaged", *DAMAGED],
    ),
    "damaged length": (partial(edit_bytes, change=lambda b: b"\xff" * 8 + b[8:]), ["cut short or damaged", *DAMAGED]),
    "damaged shape": (
        partial(edit_bytes, change=lambda b: b.replace(b"[2,2]", b"[2,9]", 1)),
        ["cut short or damaged", *DAMAGED],
    ),
    "damaged type": (
        partial(edit_bytes, change=lambda b: b.replace(b'"F32"', b'"X32"', 1)),
        ["cut short or damaged", *DAMAGED],
    ),
    "another format": (partial(edit_bytes, change=lambda b: b"PK\x03\x04" + b[4:]), ["not a whole safetensors", *DAMAGED]),
    "newer version": (
        partial(edit_config, peft_subspace_version="0.99.0"),
        ["saved by peft_subspace 0.99.0", "Install peft_subspace>=0.99.0"],
    ),
    "newer version, unknown key": (
        partial(edit_config, peft_subspace_version="0.99.0", whitening=True),
        ["saved by peft_subspace 0.99.0", "['whitening']", "Install peft_subspace>=0.99.0"],
    ),
    "another target": (
        partial(edit_config, target_modules=["q_proj", "vproj"]),
        ["target_modules names 'vproj'", "v_proj", "model.named_modules()"],
    ),
    "another rank": (partial(edit_config, r=3), [f"of another shape: {LAYER}.core is [2, 2] in the file and [3, 3]", *FITS]),
}


def refuse(model: nn.Module, name: str, act: Callable[[], Any], parts: list[str], adapter_name: str = "default") -> None:
    with unchanged(model, MODELS[name].batch()), pytest.raises(ValueError) as refused:  # noqa: PT011  # the parts are checked
        act()
    for part in parts:
        assert part.replace("NAME", adapter_name) in str(refused.value), refused.value


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_leaves_a_fresh_model_as_it_was(bad: str, options: dict[str, Any], tmp_path: Path) -> None:
    change, parts = BAD_FILES[bad]
    model = mixed_model("llama")
    change(saved_adapter(tmp_path / "bad"))
    refuse(model, "llama", lambda: PeftModel.from_pretrained(model, tmp_path / "bad", **options), parts)
    loaded = PeftModel.from_pretrained(model, saved_adapter(tmp_path / "good"), **options)  # and it can be used afterwards
    assert torch.isfinite(output(loaded, MODELS["llama"].batch())).all()


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_leaves_the_first_adapter_as_it_was(bad: str, options: dict[str, Any], tmp_path: Path) -> None:
    change, parts = BAD_FILES[bad]
    first = FloraConfig(r=3, init_weights=False, target_modules=["q_proj", "k_proj"])
    model = get_peft_model(mixed_model("llama"), first)
    change(saved_adapter(tmp_path / "bad"))
    refuse(model, "llama", lambda: model.load_adapter(tmp_path / "bad", "other", **options), parts, "other")
    model.load_adapter(saved_adapter(tmp_path / "good"), "other", **options)
    model.set_adapter("other")
    assert torch.isfinite(output(model, MODELS["llama"].batch())).all()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "llama"])
def test_every_kind_of_tensor_is_asked_for(name: str, tmp_path: Path) -> None:
    """Statistics of BatchNorm, heads, several weights of one layer, fused experts: each key, left out or left over."""
    good = saved_adapter(tmp_path / "good", name)
    for key in load_file(good / WEIGHTS):
        bad = shutil.copytree(good, tmp_path / "bad")
        edit_tensors(bad, lambda tensors, key=key: tensors.pop(key))
        model = mixed_model(name)
        short = key.removeprefix("base_model.model.")
        refuse(model, name, partial(PeftModel.from_pretrained, model, bad), ["1 missing", short])
        shutil.rmtree(bad)


def test_a_file_for_an_adapter_that_is_there_leaves_its_values(tmp_path: Path) -> None:
    bad = saved_adapter(tmp_path)
    edit_tensors(bad, lambda tensors: tensors.pop(f"{FULL_KEY}.core"))
    model = PeftModel.from_pretrained(mixed_model("llama"), saved_adapter(tmp_path / "good"), is_trainable=True)
    refuse(model, "llama", lambda: model.load_adapter(bad, "default"), ["1 missing"])
    state = get_peft_model_state_dict(model)
    refuse(model, "llama", lambda: set_peft_model_state_dict(model, {**state, "x": torch.ones(1)}), ["1 unexpected: x"])


def test_a_head_of_the_first_adapter_stays_active(tmp_path: Path) -> None:
    bad = saved_adapter(tmp_path, "bert")
    edit_tensors(bad, lambda tensors: tensors.pop(min(tensors)))
    model = get_peft_model(mixed_model("bert"), FloraConfig(r=2, init_weights=False, **TARGETS["bert"]))
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(3)
    refuse(model, "bert", lambda: model.load_adapter(bad, "other"), ["1 missing"], "other")


def test_the_file_of_another_method_is_not_forced_in(tmp_path: Path) -> None:
    get_peft_model(MODELS["llama"].model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    model = get_peft_model(mixed_model("llama"), FloraConfig(r=2, target_modules=["q_proj"]))
    refuse(model, "llama", lambda: model.load_adapter(tmp_path, "other"), ["LORA", "FLORA"])


# transformers' own loader ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "status", "key"),
    [
        ("missing key", "MISSING", f"{LAYER}.default.core"),
        ("missing layer", "MISSING", "flora_delta.default"),
        ("unexpected key", "UNEXPECTED", f"{LAYER}.default.kore"),
        ("a deeper base", "UNEXPECTED", "model.layers.2"),
        ("another rank", "MISMATCH", "q_proj.flora_delta.default.core"),
    ],
)
def test_transformers_reports(bad: str, status: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BAD_FILES[bad][0](saved_adapter(tmp_path))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = MODELS["llama"].model()
        if status == "MISMATCH":
            with pytest.raises(RuntimeError, match="report"):
                model.load_adapter(str(tmp_path))
        else:
            info = model.load_adapter(str(tmp_path))
            assert any(key in found for found in info.missing_keys | info.unexpected_keys)
            assert torch.isfinite(output(model, MODELS["llama"].batch())).all()
    finally:
        logger.removeHandler(caplog.handler)
    report = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(status in record.getMessage() and key in record.getMessage() for record in report)


@pytest.mark.parametrize("bad", ["newer version", "newer version, unknown key", "another target"])
def test_transformers_refuses_a_config(bad: str, tmp_path: Path) -> None:
    change, parts = BAD_FILES[bad]
    change(saved_adapter(tmp_path))
    model = mixed_model("llama")
    refuse(model, "llama", lambda: model.load_adapter(str(tmp_path)), parts)
