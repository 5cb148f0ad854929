"""What must work with every allowed set of versions; `make versions` runs it with the lowest and with the newest one."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_subspace import FloraConfig, SvfitConfig
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, Pico, run, train

# of other versions than ours: what they deprecate is no matter of this test
pytestmark = pytest.mark.filterwarnings("ignore")
PICO = MODELS["llama"]


def config(method: Method, pico: Pico = PICO, **fields: Any) -> Any:
    return method.make(pico, **{**pico.targets, "init_weights": False, **fields})


def test_the_environment_is_what_pyproject_asks_for() -> None:
    """Also without a conflict between PEFT and transformers, which checks PEFT's version at every use of an adapter."""
    wanted = [Requirement(text) for text in requires("peft-subspace") or []]
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            assert one.specifier.contains(version(one.name), prereleases=True), f"{one}: found {version(one.name)}"
    assert {"numpy", "scipy", "torch", "transformers", "peft"} <= {one.name for one in wanted}


@each_method
def test_train_save_load_merge(method: Method, tmp_path: Path) -> None:
    torch.manual_seed(10)
    model = get_peft_model(PICO.model(), config(method, **method.steady))
    losses = train(model, PICO.batch(), steps=6)
    assert losses[-1] < losses[0]
    expected = run(model, PICO.batch())
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(PICO.model(), str(tmp_path)).eval()
    assert torch.equal(run(loaded, PICO.batch()), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(run(merged, PICO.batch()), expected, rtol=1e-4, atol=1e-4)


@each_method
def test_in_transformers(method: Method, tmp_path: Path) -> None:
    """add_adapter, set_adapter, disable_adapters, enable_adapters, save_pretrained and load_adapter."""
    model: Any = PICO.model()
    base = run(model, PICO.batch())
    model.add_adapter(config(method), "one")
    one = run(model, PICO.batch())
    model.add_adapter(config(method, second=True), "two")
    two = run(model, PICO.batch())
    assert not torch.equal(one, two)
    model.set_adapter("one")
    assert torch.equal(run(model, PICO.batch()), one)
    model.disable_adapters()
    assert torch.equal(run(model, PICO.batch()), base)
    model.enable_adapters()
    model.set_adapter("two")
    model.save_pretrained(tmp_path)
    loaded: Any = PICO.model()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(run(loaded.eval(), PICO.batch()), two)


def test_trainer(tmp_path: Path) -> None:
    model = get_peft_model(PICO.model(), config(METHODS["FLORA"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": ids, "labels": ids} for ids in PICO.batch()["input_ids"]] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    expected = run(model.eval(), PICO.batch())
    loaded = PeftModel.from_pretrained(PICO.model(), str(tmp_path / "checkpoint-4")).eval()
    assert torch.equal(run(loaded, PICO.batch()), expected)
    fresh = get_peft_model(PICO.model(), config(METHODS["FLORA"], task_type="CAUSAL_LM"))
    Trainer(model=fresh, args=arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(run(fresh.eval(), PICO.batch()), expected)


@pytest.mark.parametrize("made", [FloraConfig(r=2), SvfitConfig(r=4)], ids=["FLORA", "SVFIT"])
def test_the_merge_script(made: Any, tmp_path: Path) -> None:
    """An adapter merged by the script is the adapter merged by PEFT."""
    PICO.model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made.target_modules, made.init_weights = "all-linear", False
    model = get_peft_model(base, made)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = run(model.merge_and_unload().eval(), PICO.batch())
    models = [{"model": str(tmp_path / "adapter"), "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "peft_subspace_cli", "merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--quiet"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(run(merged, PICO.batch()), expected, rtol=1e-4, atol=1e-4)


def test_no_import_prints_a_syntax_warning() -> None:
    """As tensorly 0.9 does from Python 3.12 on, whose floor there is above it."""
    code = "import peft_subspace, tensorly.decomposition, scipy.optimize, numpy"
    subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], check=True, cwd=Path(__file__).parents[2])
