"""What the benchmarks share: the models, the stopwatch, bytes saved for backward, peak memory, ratios and reports."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "transformers", "peft")
NUM_LABELS = 10
VOCABULARY = 1024
# The kind of problem, too: transformers writes it into the config at the first loss, and a compiled step would compile again.
LABELS: dict[str, Any] = {"num_labels": NUM_LABELS, "problem_type": "single_label_classification"}


# Models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Size of a model and of its batch.

    Attributes:
        layers: number of blocks; for the ResNet, blocks of each of the four stages, 0 for 3, 4, 6 and 3.
        width: hidden size; channels of the last stage for the ResNet.
        length: tokens of a sequence, or pixels of an image's side.
        batch: sequences or images of a step.
    """

    layers: int
    width: int
    length: int
    batch: int


@dataclass(frozen=True)
class Shape:
    """A model that is built from a config, with random weights.

    Attributes:
        build: makes the model; dropout is 0 everywhere.
        is_target: `(name, module) -> bool`, which layers get an adapter.
        embeddings: the module whose output is the input of the first block: where floor 2 begins.
        head: the module that every method trains whole.
        full: the size that the tables show.
        quick: a size that takes seconds.
        conv: whether the targets are convolutions.
    """

    build: Callable[[Sizes], nn.Module]
    is_target: Callable[[str, nn.Module], bool]
    embeddings: str
    head: str
    full: Sizes
    quick: Sizes
    conv: bool = False

    def targets(self, model: nn.Module) -> list[str]:
        """Full names of the layers that get an adapter."""
        return [name for name, module in model.named_modules() if self.is_target(name, module)]


def _llama(sizes: Sizes) -> nn.Module:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=sizes.width,
            intermediate_size=_multiple_of_64(sizes.width * 8 / 3),
            num_hidden_layers=sizes.layers,
            num_attention_heads=max(1, sizes.width // 64),
            max_position_embeddings=sizes.length,
            **LABELS,
            pad_token_id=0,
        )
    )


def _bert(sizes: Sizes) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=max(1, sizes.width // 64),
            max_position_embeddings=sizes.length,
            **LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _vit(sizes: Sizes) -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=sizes.length,
            patch_size=16,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=max(1, sizes.width // 64),
            **LABELS,
        )
    )


def _resnet(sizes: Sizes) -> nn.Module:
    depths = [3, 4, 6, 3] if sizes.layers == 0 else [sizes.layers] * 4
    widths = [sizes.width // 8, sizes.width // 4, sizes.width // 2, sizes.width]
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(layer_type="basic", depths=depths, hidden_sizes=widths, embedding_size=widths[0], **LABELS)
    )


def _multiple_of_64(size: float) -> int:
    return 64 * math.ceil(size / 64)


def _linear_in(*blocks: str) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: isinstance(module, nn.Linear) and any(f".{block}." in name for block in blocks)


def _conv_3x3(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


SHAPES = {
    "llama": Shape(_llama, _linear_in("layers"), "model.embed_tokens", "score", Sizes(12, 768, 512, 1), Sizes(1, 64, 32, 2)),
    "bert-base": Shape(
        _bert, _linear_in("encoder"), "bert.embeddings", "classifier", Sizes(12, 768, 128, 4), Sizes(1, 64, 32, 2)
    ),
    "vit-base": Shape(_vit, _linear_in("layers"), "vit.embeddings", "classifier", Sizes(12, 768, 224, 2), Sizes(1, 64, 32, 2)),
    "resnet-34": Shape(
        _resnet, _conv_3x3, "resnet.embedder", "classifier", Sizes(0, 512, 224, 16), Sizes(1, 128, 128, 1), conv=True
    ),
}


@dataclass(frozen=True)
class Workload:
    """One frozen model with its batch, from which every method starts.

    Attributes:
        shape: the kind of model.
        sizes: its size.
        model: all parameters frozen; never adapted itself, see `fresh`.
        batch: keyword arguments of the model, labels included.
    """

    shape: Shape
    sizes: Sizes
    model: nn.Module
    batch: dict[str, Tensor]

    def fresh(self, share: bool = True) -> nn.Module:
        """A copy of the model; the head is its own.

        Args:
            share: use the same frozen parameters in all copies, as long as no one writes into them.
        """
        head = {id(parameter) for parameter in self.model.get_submodule(self.shape.head).parameters()}
        shared = {id(p): p for p in self.model.parameters() if share and id(p) not in head}
        return copy.deepcopy(self.model, shared)


def make_workload(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    """Build a model and a batch; the same seed gives the same weights and the same batch."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    model = shape.build(sizes).to(device=device, dtype=dtype).train().requires_grad_(False)
    batch = {"labels": torch.randint(NUM_LABELS, (sizes.batch,))}
    if model.main_input_name == "input_ids":
        batch["input_ids"] = torch.randint(1, VOCABULARY, (sizes.batch, sizes.length))
    else:
        batch["pixel_values"] = torch.randn(sizes.batch, 3, sizes.length, sizes.length).to(dtype)
    return Workload(shape, sizes, model, {key: value.to(device) for key, value in batch.items()})


def pick_sizes(name: str, quick: bool, **overrides: int | None) -> Sizes:
    """The full or the quick size of a model, with what the command line overrides."""
    shape = SHAPES[name]
    return replace(shape.quick if quick else shape.full, **{k: v for k, v in overrides.items() if v is not None})


# Measuring -----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Process CPU time on a CPU (other jobs on the machine do not count), events on a GPU. Milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_ms = 0.0
        self.wall_ms = 0.0

    @property
    def ms(self) -> float:
        """The figure that ratios are made of."""
        return self.wall_ms if self.device.type == "cuda" else self.cpu_ms

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the body; young garbage is collected before and none during it."""
        gc.collect(1)
        gc.disable()
        try:
            if self.device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(self.device)
                cpu = time.process_time()
                start.record()
                yield
                stop.record()
                torch.cuda.synchronize(self.device)
                self.cpu_ms, self.wall_ms = 1e3 * (time.process_time() - cpu), start.elapsed_time(stop)
            else:
                wall, cpu = time.perf_counter(), time.process_time()
                yield
                self.cpu_ms, self.wall_ms = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
        finally:
            gc.enable()


def bytes_saved(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward.

    Rule: every storage that a saved tensor lies in counts once and whole, whoever saved it and however small the view.
    Storages of parameters and buffers of the model do not count: they are there anyway. The batch counts.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def resident_growth(body: Callable[[], Any]) -> int | None:
    """Bytes by which the peak resident set of this process exceeds what it holds before `body`. Linux only, else None.

    Meant for a fresh process: memory that an earlier peak left to the allocator would hide what `body` needs.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        before = _status_bytes("VmRSS")
        body()
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def run_alone(script: str, *options: str) -> str:
    """The last line that a benchmark prints in a process of its own, for peaks of memory.

    The allocator gives everything back at once there: else a peak is that of its own holes, by tens of megabytes.

    Raises:
        RuntimeError: the process failed; the message has its stderr.
    """
    command = [sys.executable, str(Path(script).resolve()), *options]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"The process {' '.join(options)!r} of {Path(script).name} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def rotated(names: list[str], round_number: int) -> list[str]:
    """The order of one round (a Williams design): over the rounds no method keeps its place or its predecessor.

    What a method leaves in the caches then hits all others alike. `[0, n-1, 1, n-2, ...]`, moved on by one each round.
    """
    count = len(names)
    zigzag = [position // 2 if position % 2 == 0 else count - 1 - position // 2 for position in range(count)]
    return [names[(place + round_number) % count] for place in zigzag]


# Ratios --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratio(cls, values: list[float], base: list[float]) -> Spread:
        """Ratio within each round, then median and range: what slows a whole round down cancels."""
        return cls.of([value / one for value, one in zip(values, base, strict=True)])

    def text(self, digits: int = 2) -> str:
        """`0.93 (0.91-0.96)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


# Reports -------------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine; no names of hosts, users or folders."""
    return {
        "command": " ".join(["python", *(_relative(arg) if os.path.isabs(arg) else arg for arg in sys.argv)]),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}, "peft_subspace": _own_version()},
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }


def _relative(path: str) -> str:
    try:
        return Path(path).resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return Path(path).name


def _own_version() -> str:
    import peft_subspace

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return " ".join([peft_subspace.__version__, git.stdout.strip()]).strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_json(name: str, folder: Path | None) -> dict[str, Any]:
    """A report that was written before; empty if there is none."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(report: dict[str, Any], name: str, folder: Path | None) -> Path:
    """Write a report to `<folder>/<name>.json`; the default folder is benchmarks/results."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path
