"""What `make gpu` measures: the llama-1B-shaped step in bfloat16, 1024 tokens, eager and compiled. Needs a GPU.

    python benchmarks/gpu.py

FLoRA, SVFit, PELA, aTLAS, LoRA, DoRA, full fine-tuning and the floors, by the code of step.py and compiled.py: times by
CUDA events, peak memory, ratios within the run; then the Triton kernels of dense task vectors against the chunks that they
stand for. Results: gpu-step-1b-bf16.json, gpu-compiled-1b-bf16.json and gpu-kernels.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import compiled, measure, step
from benchmarks.further import ALL
from benchmarks.measure import Spread, Stopwatch
from peft_subspace.functional import triton_kernels
from peft_subspace.functional.composition import Dense, accumulate, inner_products

SHAPE = ["--layers", "16", "--width", "2048", "--length", "1024", "--dtype", "bf16", "--device", "cuda"]


def kernels(
    device: torch.device,
    shapes: tuple[tuple[int, int], ...] = ((2048, 2048), (8192, 2048), (11008, 4096)),
    counts: tuple[int, ...] = (2, 4, 16),
    rounds: int = 20,
) -> dict[str, Any]:
    """Times of composing and of the inner products for T dense vectors: by the kernels, by chunks, and their ratios by round.

    Both are called in turn in every round, once before the rounds to compile; the gradient is in bfloat16.
    """
    rows: dict[str, Any] = {}
    for shape in shapes:
        for count in counts:
            for dtype in (torch.float32, torch.bfloat16):
                size = shape[0] * shape[1]
                vectors = [Dense(torch.randn(size, device=device).to(dtype)) for _ in range(count)]
                total = torch.randn(shape, device=device)
                numbers, grad = torch.randn(count, device=device), torch.randn(shape, device=device).bfloat16()
                calls: dict[str, Callable[[], Any]] = {
                    "compose": partial(accumulate, total, vectors, numbers),
                    "inner products": partial(inner_products, grad, vectors),
                }
                for what, call in calls.items():
                    times: dict[str, list[float]] = {"1": [], "0": []}
                    for number in range(rounds + 1):
                        for switch, found in times.items():
                            os.environ[triton_kernels.SWITCH] = switch
                            watch = Stopwatch(device)
                            with watch.running():
                                call()
                            if number:
                                found.append(watch.ms)
                    ratio = Spread.of([a / b for a, b in zip(times["1"], times["0"], strict=True)])
                    name = f"{what}, {shape[0]} x {shape[1]}, {count} vectors, {dtype}".replace("torch.", "")
                    rows[name] = {"kernel_ms": times["1"], "chunks_ms": times["0"], "ratio": vars(ratio)}
                    print(f"{name}: kernel / chunks {ratio.text()}")
    os.environ.pop(triton_kernels.SWITCH)
    return {**measure.environment(device), "rows": rows}


def main() -> None:
    """Run all, or say why not."""
    if not torch.cuda.is_available():
        print("No GPU is visible to torch: nothing was measured and nothing was written.")
        return
    step.PROVIDERS.update(ALL)
    methods = "floor-1,floor-2,flora,svfit-16,svfit-full,pela,atlas-lora,atlas,dora,full"
    step.main([*SHAPE, "--model", "llama", "--methods", methods, "--name", "gpu-step-1b-bf16"])
    compiled.main([*SHAPE, "--name", "gpu-compiled-1b-bf16"])
    if triton_kernels.triton is None:
        print("Triton is not installed: its kernels were not measured.")
        return
    measure.write_json(kernels(torch.device("cuda")), "gpu-kernels", None)


if __name__ == "__main__":
    main()
