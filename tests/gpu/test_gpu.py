"""What needs a GPU: the files for `accelerate launch`, and inductor's kernels. `make gpu` runs it; elsewhere it is skipped."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_subspace.functional import composition, triton_kernels
from peft_subspace.functional.composition import Dense
from tests.methods import Method, each_method
from tests.pico import MODELS, run, train
from tests.processes import REPOSITORY

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@needs_gpu
@each_method
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_as_the_cpu_does(method: Method, compiled: bool) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(10)
        model = get_peft_model(MODELS["llama"].model(), method.make(MODELS["llama"], **MODELS["llama"].targets)).to(device)
        call = torch.compile(model, fullgraph=True) if compiled and device == "cuda" else model
        batch = {key: value.to(device) for key, value in MODELS["llama"].batch().items()}
        losses[device] = train(call, batch)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)  # TF32 is off; sums have another order


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("one-gpu-bf16", marks=needs_gpu),
        pytest.param("ddp", marks=needs_two),
        pytest.param("fsdp2", marks=needs_two),
        pytest.param("zero3", marks=[needs_two, needs_deepspeed]),
    ],
)
@pytest.mark.parametrize("method", ["flora", "svfit"])
def test_launched(name: str, method: str, tmp_path: Path) -> None:
    """The example under each file: the number of processes, and a whole adapter."""
    command = ["accelerate.commands.launch", "--config_file", f"examples/accelerate/{name}.yaml", "examples/finetune.py"]
    options = ["--method", method, "--bf16", "--train_rows", "64", "--eval_rows", "32", "--max_steps", "4"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *options, "--output_dir", str(tmp_path), "--report_to", "none"],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"by processes: {1 if name.startswith('one') else 2}" in done.stdout
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@needs_gpu
@pytest.mark.skipif(triton_kernels.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", triton_kernels.TYPES, ids=str)
def test_the_triton_kernels_compute_what_the_chunks_do(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [Dense(torch.randn(300, 200).flatten().to(dtype)) for _ in range(5)]
    numbers, grad, found = torch.randn(5).cuda(), torch.randn(300, 200).cuda(), {}
    for switch in ("0", "1"):
        monkeypatch.setenv(triton_kernels.SWITCH, switch)
        assert triton_kernels.is_on(grad) == (switch == "1")
        total = torch.ones(300, 200).cuda()
        composition.accumulate(total, vectors, numbers)
        found[switch] = total, composition.inner_products(grad, vectors)
    for kernel, chunks in zip(found["1"], found["0"], strict=True):
        torch.testing.assert_close(kernel, chunks, rtol=1e-4, atol=1e-3)


@needs_gpu
@each_method
def test_saved_on_a_gpu_and_loaded_on_the_cpu(method: Method, tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"].model().cuda(), method.make(MODELS["llama"], **MODELS["llama"].targets))
    batch = MODELS["llama"].batch()
    train(model, {key: value.cuda() for key, value in batch.items()})
    model.save_pretrained(str(tmp_path))
    expected = run(model.cpu().eval(), batch)
    loaded = PeftModel.from_pretrained(MODELS["llama"].model(), str(tmp_path)).eval()
    torch.testing.assert_close(run(loaded, batch), expected)
