"""Weight matching: reorder the hidden units of one model so that its weights meet those of another.

The hidden units of an MLP, the heads of an attention layer and (on request) the coordinates of the residual stream can be
reordered without a change of what a model computes. For models that were not fine-tuned from one base this decides whether
their weights can be averaged at all; for models that were, it does nothing. So it is a step of its own, before a merge.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One axis of a tensor: `count` blocks of `width` entries are reordered as wholes."""

    tensor: str
    axis: int
    width: int = 1


@dataclass(frozen=True)
class Permutation:
    """One reordering, shared by all of its places.

    Args:
        name: What is reordered.
        count: Number of units.
        places: All axes that carry them.
    """

    name: str
    count: int
    places: tuple[Place, ...]


# How layers are called: what writes hidden units (rows), what reads them (columns). Suffixes after the block's prefix.
_MLPS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("mlp.fc1",), "mlp.fc2"),  # ViT, DINOv2, CLIP, SigLIP
    (("intermediate.dense",), "output.dense"),  # BERT and its kin, ViT before transformers 5
)
_ATTENTIONS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj", "self_attn.out_proj")),
    (("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("attention.o_proj",)),
    (("attention.self.query", "attention.self.key", "attention.self.value"), ("attention.output.dense",)),
    (("attention.attention.query", "attention.attention.key", "attention.attention.value"), ("attention.output.dense",)),
)
_BLOCK = re.compile(r"^(.*?\b(?:layers?|h|blocks)\.\d+\.)")

# Axes that carry the residual stream, by the last parts of a tensor's name.
_RESIDUAL = (
    (r"(q_proj|k_proj|v_proj|query|key|value|gate_proj|up_proj|fc1|intermediate\.dense|lm_head|pooler\.dense)\.weight$", 1),
    (r"(embed_tokens|word_embeddings|position_embeddings|token_type_embeddings)\.weight$", 1),
    (r"(cls_token|mask_token|position_embeddings)$", -1),
    (r"(o_proj|out_proj|down_proj|fc2|output\.dense|patch_embeddings\.projection)\.(weight|bias)$", 0),
    (r"((?<![qk]_)(norm\d?|layernorm|LayerNorm|layernorm_before|layernorm_after))\.(weight|bias)$", 0),
    (r"lambda1$", 0),
)
_NOT_RESIDUAL = re.compile(
    r"(q_proj|k_proj|v_proj|query|key|value|gate_proj|up_proj|fc1|intermediate\.dense|pooler\.dense|lm_head|classifier)\.bias$"
    r"|[qk]_norm\.weight$"
)


def find_permutations(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, heads: bool = True, residual: bool = False
) -> list[Permutation]:
    """The reorderings that leave a Llama-like, BERT-like or ViT-like model's function as it is.

    Args:
        shapes: Shape of every tensor, by name.
        config: The model's config: `num_attention_heads`, `num_key_value_heads`.
        heads: Reorder attention heads; with grouped queries, whole groups of them.
        residual: Reorder the residual stream as well, in every tensor that it passes.

    Returns:
        One `Permutation` for each MLP and attention layer that is found, and one for the residual stream.

    Raises:
        ValueError: Nothing was found; sizes and heads do not fit; or a tensor has an axis of the residual stream's size, but a
            name that does not say what it is.
    """
    found = []
    prefixes = dict.fromkeys(match.group(1) for name in shapes if (match := _BLOCK.match(name)))
    for prefix in prefixes:
        for writers, reader in _MLPS:
            if f"{prefix}{reader}.weight" in shapes and f"{prefix}{writers[0]}.weight" in shapes:
                places = _places(shapes, prefix, writers, reader, [1] * len(writers), 1)
                found.append(Permutation(f"{prefix}mlp", shapes[f"{prefix}{reader}.weight"][1], places))
        for projections, outputs in _ATTENTIONS if heads else ():
            for output in outputs:
                if f"{prefix}{output}.weight" in shapes and f"{prefix}{projections[0]}.weight" in shapes:
                    found.append(_heads(shapes, config, prefix, projections, output))
    if residual:
        found.append(_residual(shapes))
    if not found:
        raise ValueError("no MLP or attention layer with a known name; weight matching knows Llama-, BERT- and ViT-like models")
    return found


def _places(
    shapes: Mapping[str, Any], prefix: str, writers: Sequence[str], reader: str, widths: Sequence[int], reader_width: int
) -> tuple[Place, ...]:
    """Rows (and biases) of the writers, columns of the reader."""
    places = [
        Place(f"{prefix}{writer}.{kind}", 0, width)
        for writer, width in zip(writers, widths, strict=True)
        for kind in ("weight", "bias")
        if f"{prefix}{writer}.{kind}" in shapes
    ]
    return (*places, Place(f"{prefix}{reader}.weight", 1, reader_width))


def _heads(
    shapes: Mapping[str, Any], config: Mapping[str, Any], prefix: str, projections: Sequence[str], output: str
) -> Permutation:
    """Heads of one attention layer, or groups of them that share keys and values."""
    if not config.get("num_attention_heads"):
        raise ValueError("the config has no `num_attention_heads`; pass heads=False, or the whole config")
    count = config.get("num_key_value_heads") or config["num_attention_heads"]
    rows = [shapes[f"{prefix}{projection}.weight"][0] for projection in projections]
    if any(size % count for size in rows):
        raise ValueError(f"{prefix}{projections[0]}: {rows} rows (query, key, value) do not divide into {count} heads")
    widths = [size // count for size in rows]
    return Permutation(f"{prefix}heads", count, _places(shapes, prefix, projections, output, widths, widths[0]))


def _residual(shapes: Mapping[str, Any]) -> Permutation:
    """The residual stream of the whole model."""
    places = []
    for name, shape in shapes.items():
        axes = [axis for pattern, axis in _RESIDUAL if re.search(pattern, name)]
        if name.endswith("classifier.weight") and not any("pooler" in other for other in shapes):
            axes = [1]  # reads the stream itself; behind a pooler it does not
        if axes:
            places.append(Place(name, axes[0] % len(shape)))
    sizes = {shapes[place.tensor][place.axis] for place in places}
    if len(sizes) != 1:
        raise ValueError(f"the axes of the residual stream have different sizes: {sorted(sizes)}; pass residual=False")
    (size,) = sizes
    known = {place.tensor for place in places}
    behind_pooler = {name for name in shapes if name.endswith("classifier.weight")}
    unknown = [
        n for n, s in shapes.items() if size in tuple(s) and n not in known | behind_pooler and not _NOT_RESIDUAL.search(n)
    ]
    if unknown:
        raise ValueError(
            f"cannot tell whether the residual stream passes {', '.join(unknown[:5])} ({len(unknown)} in all); "
            "pass residual=False"
        )
    return Permutation("residual", size, tuple(places))


@dataclass(frozen=True)
class Alignment:
    """What `match` found.

    Args:
        orders: For each permutation: unit i of the aligned model is unit `orders[name][i]` of the model as it was.
        before: Cosine of the two models over all tensors that can be reordered.
        after: The same, aligned.
        sweeps: Rounds over all permutations.
    """

    orders: dict[str, Tensor]
    before: float
    after: float
    sweeps: int


def reorder(
    tensor: Tensor, places: Sequence[tuple[Place, str]], orders: Mapping[str, Tensor], skip: str | None = None
) -> Tensor:
    """A tensor with its units in their new order, on every axis but that of the permutation `skip`."""
    for place, name in places:
        if name == skip:
            continue
        order = orders[name]
        if place.width > 1:
            order = (order.unsqueeze(1) * place.width + torch.arange(place.width)).view(-1)
        tensor = tensor.index_select(place.axis, order.to(tensor.device))
    return tensor


def _by_tensor(permutations: Sequence[Permutation]) -> dict[str, list[tuple[Place, str]]]:
    found: dict[str, list[tuple[Place, str]]] = {}
    for permutation in permutations:
        for place in permutation.places:
            found.setdefault(place.tensor, []).append((place, permutation.name))
    return found


def apply(state: Mapping[str, Tensor], permutations: Sequence[Permutation], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its units in their new order; it computes what it did before."""
    places = _by_tensor(permutations)
    return {name: reorder(tensor, places.get(name, ()), orders) for name, tensor in state.items()}


def gains(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], permutation: Permutation, places: Any, orders: Mapping[str, Tensor]
) -> Tensor:
    """`[count, count]`: <units i of a, units j of b> over all tensors that carry them, all else of b in its present order."""
    total = torch.zeros(permutation.count, permutation.count, dtype=torch.float64)
    for place in permutation.places:
        other = reorder(b[place.tensor].float(), places[place.tensor], orders, skip=permutation.name)
        mine, theirs = (x.movedim(place.axis, 0).reshape(permutation.count, -1) for x in (a[place.tensor].float(), other))
        total += (mine @ theirs.t()).to(total.device, torch.float64)
    return total


def match(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], permutations: Sequence[Permutation], *, seed: int = 0, sweeps: int = 100
) -> Alignment:
    """Reorder the units of `b` so that Sigma <a, b> over the tensors that carry them is as large as possible.

    Each permutation in turn is set to the best one, given the others: a linear assignment on the units' dot products. A
    round goes over all of them in random order, until none gains. MLPs and heads do not depend on each other, so without the
    residual stream the first round finds the optimum; with it the result is a local one.

    Args:
        a: State dict of the model that stays as it is.
        b: State dict of the model that is to be aligned, with the same names and shapes.
        permutations: Of `find_permutations`.
        seed: Of the order of the permutations.
        sweeps: Greatest number of rounds.

    Returns:
        The `Alignment`; `apply(b, permutations, alignment.orders)` is the aligned model.

    Raises:
        ValueError: A tensor is missing in one of the models, or has another shape.

    Cost: for each permutation of n units and round 2 n^2 flops for each of their entries, and O(n^3) for the assignment
    (n = 14336: minutes, and 1.6 GB).
    Source: Git Re-Basin (arXiv:2209.04836), algorithm 1; `scipy.optimize.linear_sum_assignment`.
    """
    from scipy.optimize import linear_sum_assignment

    places = _by_tensor(permutations)
    for name in places:
        if name not in a or name not in b or a[name].shape != b[name].shape:
            shapes = [tuple(state[name].shape) if name in state else "none" for state in (a, b)]
            raise ValueError(f"{name} must have one shape in both models to be aligned, got {shapes[0]} and {shapes[1]}")
    orders = {permutation.name: torch.arange(permutation.count) for permutation in permutations}
    before = _cosine(a, b, places, orders)
    shuffle = random.Random(seed)
    sweep, changed = 0, True
    while changed and sweep < sweeps:
        sweep, changed = sweep + 1, False
        for permutation in shuffle.sample(list(permutations), len(permutations)):
            gain = gains(a, b, permutation, places, orders)
            best = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
            units = torch.arange(permutation.count)
            old, new = gain[units, orders[permutation.name]].sum(), gain[units, best].sum()
            if new > old + 1e-9 * old.abs():  # more than rounding
                orders[permutation.name], changed = best, True
    return Alignment(orders, before, _cosine(a, b, places, orders), sweep)


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], places: Any, orders: Mapping[str, Tensor]) -> float:
    dot, squares = 0.0, [0.0, 0.0]
    for name, where in places.items():
        mine, theirs = a[name].double(), reorder(b[name], where, orders).double()
        dot += float((mine * theirs).sum())
        squares = [total + float(x.square().sum()) for total, x in zip(squares, (mine, theirs), strict=True)]
    return dot / (squares[0] * squares[1]) ** 0.5 if all(squares) else 0.0
