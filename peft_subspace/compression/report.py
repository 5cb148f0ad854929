"""What a compression costs and saves: parameters, flops, bytes, speed, memory, and the error of every layer."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..base import SubspaceLayer
from ..base.active import chosen_adapter
from ..base.teacher import as_teacher

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One compressed weight.

    Attributes:
        name: of the layer.
        shape: of the weight, canonical: `[out, in / groups, *kernel]`.
        ranks: `(k,)` or `(k_out, k_in)`.
        before, after: numbers in the weight and in its factors.
        error: ||R L - W||_F / ||W||_F.
        largest: max_ij |(R L - W)_ij|.
        is_dense: exported as a dense product, because the module reads its weight by itself.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    before: int
    after: int
    error: float
    largest: float
    is_dense: bool


@dataclass(frozen=True)
class Cost:
    """Of one model: the original, or the compressed one.

    Attributes:
        parameters: numbers in all.
        bytes: of the parameters (a file also has its header, and statistics of BatchNorm layers).
        flops: of one forward of the batch; None without a batch.
        samples_per_second, tokens_per_second: measured; tokens are the entries of `input_ids`, None if there are none.
        peak_bytes: weights plus the most that a forward held beside them (on a GPU what the allocator saw).
    """

    parameters: int
    bytes: int
    flops: int | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class CompressionReport:
    """See `compression_report`."""

    layers: list[LayerReport]
    before: Cost
    after: Cost
    dense: list[str] = field(default_factory=list)  # linear layers and embeddings that are not compressed
    adapter_name: str | None = None

    def tables(self) -> list[Table]:
        """Two tables for `rich.print`: the model, and every layer."""
        from rich.table import Table

        whole = Table("", "original", f"compressed ({self.adapter_name})" if self.adapter_name else "compressed", "ratio")
        rows: list[tuple[str, str, Callable[[Any], str]]] = [
            ("parameters", "parameters", lambda n: f"{n:,}"),
            ("file, MB", "bytes", lambda n: f"{n / 1e6:.1f}"),
            ("flops of the batch, G", "flops", lambda n: f"{n / 1e9:.2f}"),
            ("samples per second", "samples_per_second", lambda n: f"{n:.1f}"),
            ("tokens per second", "tokens_per_second", lambda n: f"{n:,.0f}"),
            ("peak memory, MB", "peak_bytes", lambda n: f"{n / 1e6:.1f}"),
        ]
        for label, name, shown in rows:
            old, new = getattr(self.before, name), getattr(self.after, name)
            if old is not None and new is not None:
                whole.add_row(label, shown(old), shown(new), f"{new / old:.2f}" if old else "-")
        each = Table("layer", "weight", "rank", "parameters", "kept", "relative error", "largest |RL - W|")
        for layer in self.layers:
            ranks = ", ".join(map(str, layer.ranks)) + (" (exported dense)" if layer.is_dense else "")
            sizes = " x ".join(map(str, layer.shape))
            kept = f"{100 * layer.after / layer.before:.0f} %"
            each.add_row(layer.name, sizes, ranks, f"{layer.after:,}", kept, f"{layer.error:.3f}", f"{layer.largest:.3g}")
        return [whole, each]

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw rank, error and largest deviation of every layer; the ending of `path` chooses the format. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.16 * len(self.layers) + 3), 6.5))
        panels = figure.subplots(3, 1, sharex=True)
        places = range(len(self.layers))
        panels[0].bar(places, [100 * layer.after / layer.before for layer in self.layers], color="tab:blue")
        panels[0].set_ylabel("parameters kept, %")
        panels[1].bar(places, [100 * layer.error for layer in self.layers], color="tab:orange")
        panels[1].set_ylabel("relative error, %")
        panels[2].bar(places, [layer.largest for layer in self.layers], color="tab:red")
        panels[2].set_ylabel("largest |RL - W|")
        panels[2].set_xticks(list(places), [layer.name for layer in self.layers], rotation=90, fontsize=6)
        for panel in panels:
            panel.grid(axis="y", alpha=0.3)
        figure.tight_layout()
        figure.savefig(os.fspath(path), dpi=130)


@torch.no_grad()
def compression_report(
    model: Any, batch: Mapping[str, Any] | None = None, adapter_name: str | None = None, rounds: int = 5
) -> CompressionReport:
    """Compare a model with its low-rank adapter to the original.

    Args:
        model: a PeftModel with the adapter active, not exported yet.
        batch: keyword arguments of a forward, to count its flops, time it and measure its memory; None leaves those out.
        adapter_name: the adapter; None for the active one.
        rounds: timed forwards of each model, in turns; the median counts.

    Raises:
        ValueError: no such adapter, or one that does not replace its base.
    """
    adapter_name = chosen_adapter(model, adapter_name)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers, gone = [], set()
    for name, layer in base.named_modules():
        if isinstance(layer, SubspaceLayer) and layer.has_adapter(adapter_name):
            if not layer.delta_cls.replaces_base:
                raise ValueError(f"The adapter {adapter_name!r} adds to its base and compresses nothing.")
            found = [
                _layer(name, layer, container, adapter_name, delta) for container, delta in layer.deltas(adapter_name).items()
            ]
            layers += found
            gone |= {f"{name}.base_layer.weight" for one in found if not one.is_dense}
    if not layers:
        raise ValueError(f"There is no adapter {adapter_name!r} that compresses a layer.")
    before, kept = _size(base, set()), _size(base, gone)
    factors = [(one.after, before.bytes // before.parameters) for one in layers if not one.is_dense]
    after = Cost(kept.parameters + sum(n for n, _ in factors), kept.bytes + sum(n * width for n, width in factors))
    if batch is not None:
        before, after = _measured(model, batch, before, after, rounds)
    known = {one.name for one in layers}
    dense = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    copies = ("modules_to_save", "original_module")
    dense = [name for name in dense if not any(name.startswith(f"{key}.") or name == key for key in known)]
    dense = [name for name in dense if not any(part in name for part in copies)]
    return CompressionReport(layers, before, after, dense, adapter_name)


def _layer(name: str, layer: Any, container: str, adapter_name: str, delta: Any) -> LayerReport:
    weight = layer._canonical_weight(container)
    difference = layer.dense_update(container, adapter_name).float()
    suffix = "" if len(layer.geometries) == 1 else f".{layer.geometries[container][0]}"
    factors = [p for key, p in delta.named_parameters() if key != "bias"]
    return LayerReport(
        name + suffix,
        tuple(weight.shape),
        tuple(delta.ranks),
        weight.numel(),
        sum(p.numel() for p in factors),
        float(difference.norm() / weight.float().norm().clamp_min(1e-30)),
        float(difference.abs().max()),
        delta.geometry.reads_own_weight,
    )


def _size(base: nn.Module, gone: set[str]) -> Cost:
    """The original model without some of its parameters; one that another module shares stays."""
    added: set[int] = set()
    for module in base.modules():
        if isinstance(module, SubspaceLayer):
            added |= {id(p) for container in module.geometries for p in getattr(module, container).parameters()}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            added |= {id(p) for p in module.modules_to_save.parameters()} if hasattr(module, "modules_to_save") else set()
    named = base.named_parameters(remove_duplicate=False)
    own = {id(p): p for name, p in named if id(p) not in added and name not in gone}
    return Cost(sum(p.numel() for p in own.values()), sum(p.numel() * p.element_size() for p in own.values()))


def _measured(model: Any, batch: Mapping[str, Any], before: Cost, after: Cost, rounds: int) -> tuple[Cost, Cost]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    modes: list[tuple[Cost, Any]] = [(before, lambda: as_teacher(model)), (after, nullcontext)]
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for index, (_, mode) in enumerate(modes):
            with mode():
                elapsed = _timed(model, batch)
            if turn:  # the first warms up
                times[index].append(elapsed)
    samples = len(next(iter(batch.values())))
    ids = batch.get("input_ids")
    found = []
    for (cost, mode), seconds in zip(modes, times, strict=True):
        with mode(), FlopCounterMode(display=False) as counter:
            model(**batch)
        with mode():
            peak = _peak(model, batch)
        median = statistics.median(seconds)
        tokens = None if ids is None else ids.numel() / median
        found.append(Cost(cost.parameters, cost.bytes, counter.get_total_flops(), samples / median, tokens, cost.bytes + peak))
    for module, mode in training.items():
        module.training = mode
    return found[0], found[1]


def _timed(model: Any, batch: Mapping[str, Any]) -> float:
    _synchronize(model)
    start = time.perf_counter()
    model(**batch)
    _synchronize(model)
    return time.perf_counter() - start


def _synchronize(model: Any) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def _peak(model: Any, batch: Mapping[str, Any]) -> int:
    """Bytes that a forward holds at most beside the weights."""
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**batch)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
