"""Adapter files as deltas: LoRA and DoRA of PEFT, and the adapters of this package. Reads headers only; imports no PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .adapter_fields import OTHER_LORA
from .deltas import Delta, LoraDelta, TuckerDelta
from .dense_deltas import DoraDelta, ParameterDelta
from .errors import InputError
from .headers import TensorHeader
from .lora_starts import Part, ResidualDelta, part_taken
from .sources import Checkpoint, shortened

PEFT_PREFIX = "base_model.model."
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}  # they store linear weights as [in, out]
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:(?:embedding_)?[AB]|magnitude_vector))(?:\.weight)?")
_FLORA = re.compile(r"(?P<module>.+)\.flora_delta(?:_(?P<weight>\w+))?\.(?P<tensor>core|factor_\d+)")
_BATCH_NORM = re.compile(r"(?P<module>.+)\.\w+_batch_norm\.(?P<tensor>running_mean|running_var|num_batches_tracked)")


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, by the names of the model that it was trained on.

    Attributes:
        deltas: weight -> what is added to it. A weight `<module>.weight` may stand for a bare parameter of the module.
        saved: weight -> what replaces it (`modules_to_save`, trained biases, BatchNorm statistics).
        base: the model that its config names.
        bare: ends of the names of parameters that belong to no layer and may be meant by `<module>.weight`.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    saved: dict[str, TensorHeader] = field(default_factory=dict)
    base: str | None = None
    bare: tuple[str, ...] = ()


def read_lora(checkpoint: Checkpoint, model_type: str | None = None) -> Adapter:
    """Read a LoRA or DoRA; its file says by itself which weights are stored the other way round.

    Deltas of DoRA and of bare parameters (`target_parameters`) are complete when they are put on a weight (`OnWeight.on`).

    Raises:
        InputError: a LoRA that is more than that, by the name of its variant; or a file that is not whole.
    """
    config = checkpoint.config
    other = [title for option, title in OTHER_LORA.items() if config.get(option)]
    if other:
        raise InputError(
            f"{checkpoint.name}: uses {' and '.join(other)}, which is not a plain sum W + s B A. Merge it into its model first "
            f"(`model.merge_and_unload().save_pretrained(...)`) and give that model instead."
        )
    taken = part_taken(checkpoint.name, config.get("init_lora_weights", True))
    parts: dict[str, dict[str, TensorHeader]] = {}
    saved: dict[str, TensorHeader] = {}
    for key, tensor in checkpoint.tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if match := _LORA.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_velora_" in name:
            continue  # what VeLoRA keeps of activations for the backward pass; its update is a plain LoRA
        elif "lora_" in name:
            raise InputError(f"{checkpoint.name}: the tensor {key!r} is not part of a plain LoRA.")
        else:  # also the weight of an embedding below its LoRA, which PEFT stores too: it may be another than the base's
            _keep_whole(saved, name, tensor)
    deltas: dict[str, Delta] = {}
    owners = tuple(f".{name.rpartition('.')[0]}" for name in _bare(checkpoint))
    for module, tensors in parts.items():
        owner = module.replace(".base_layer", "")
        if f".{owner}".endswith(owners):  # several parameters of a module are told apart by nested base_layers
            deltas[f"{module}.weight"] = _parameter_delta(checkpoint, module, tensors, taken)
        else:
            deltas[f"{owner}.weight"] = _lora_delta(checkpoint, module, tensors, taken)
    if not deltas and not saved:
        raise InputError(f"{checkpoint.name}: has no tensors.")
    return Adapter(deltas, saved, config.get("base_model_name_or_path"), tuple(_bare(checkpoint)))


def _lora_delta(
    checkpoint: Checkpoint, module: str, tensors: dict[str, TensorHeader], taken: Part | None
) -> LoraDelta | DoraDelta | ResidualDelta:
    config, embedding = checkpoint.config, any("embedding" in part for part in tensors)
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
    if config.get("use_dora"):
        names.append("lora_magnitude_vector")
    if set(tensors) != set(names):
        raise InputError(f"{checkpoint.name}: {module!r} has {', '.join(sorted(tensors))}; {' and '.join(names)} are expected.")
    down, up = tensors[names[0]], tensors[names[1]]
    r = _pattern(checkpoint, "rank_pattern", module, config.get("r"))
    alpha = _pattern(checkpoint, "alpha_pattern", module, config.get("lora_alpha"))
    if len(down.shape) < 2 or len(up.shape) < 2 or (down.shape[0], up.shape[1]) != (r, r):
        grouped = len(down.shape) > 2 and down.shape[0] == r
        raise InputError(
            f"{checkpoint.name}: {module!r} has A {list(down.shape)} and B {list(up.shape)}, which do not fit its rank {r}"
            + (": a convolution with groups, whose LoRA cannot be merged into its weight." if grouped else ".")
        )
    scale = _lora_scale(checkpoint, module, alpha, r)
    owner = f"{checkpoint.name}: {module!r}"
    lora = LoraDelta(down, up, scale, transposed=embedding or bool(config.get("fan_in_fan_out")))
    # PEFT starts embeddings in its own way, whatever the config says.
    found = lora if taken is None or embedding else ResidualDelta(owner, lora, taken)
    return DoraDelta(owner, found, tensors[names[2]]) if config.get("use_dora") else found


def _lora_scale(checkpoint: Checkpoint, module: str, alpha: Any, r: int) -> float:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{checkpoint.name}: {module!r} has lora_alpha {alpha!r}, which is not a number.")
    return alpha / (math.sqrt(r) if checkpoint.config.get("use_rslora") else r)


def _parameter_delta(
    checkpoint: Checkpoint, module: str, tensors: dict[str, TensorHeader], taken: Part | None
) -> ParameterDelta:
    """LoRA on one of the bare parameters of a module; which one, the shapes say when the base is known."""
    config, owner = checkpoint.config, f"{checkpoint.name}: {module!r}"
    if taken is not None:
        raise InputError(f"{owner}: init_lora_weights={taken!r} together with target_parameters is not supported.")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise InputError(f"{owner}: a rank_pattern or alpha_pattern together with target_parameters is not supported.")
    down, up, r = tensors.get("lora_A"), tensors.get("lora_B"), config.get("r")
    if down is None or up is None or len(tensors) > 2:
        raise InputError(f"{owner} has {', '.join(sorted(tensors))}; lora_A and lora_B are expected.")
    if not isinstance(r, int) or r < 1 or len(down.shape) != 2 or down.shape[0] % r or up.shape[1:] != down.shape[:1]:
        raise InputError(f"{owner} has A {list(down.shape)} and B {list(up.shape)}, which do not fit its rank {r}.")
    return ParameterDelta(owner, down, up, r, _lora_scale(checkpoint, module, config.get("lora_alpha"), r))


def _pattern(checkpoint: Checkpoint, field_name: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first expression that matches the end of the module's name."""
    table = checkpoint.config.get(field_name) or {}
    try:
        found = table.get(module, default) if module in table else next(
            (value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", module)), default
        )  # fmt: skip
    except (re.error, AttributeError) as error:
        raise InputError(f"{checkpoint.name}: its {field_name} cannot be read: {error}.") from error
    return found


def by_layer(
    checkpoint: Checkpoint, pattern: re.Pattern[str], prefix: str, title: str
) -> tuple[dict[tuple[str, str | None], dict[str, TensorHeader]], dict[str, TensorHeader]]:
    """Sort the tensors of an adapter of this package: (module, weight or None) -> tensor -> header, and what is saved whole.

    Args:
        checkpoint: the adapter.
        pattern: of the tensors' names, with the groups `module`, `weight` and `tensor`.
        prefix: of the method; a name with it that does not fit the pattern is an error.
        title: of the method, for that error.
    """
    parts: dict[tuple[str, str | None], dict[str, TensorHeader]] = {}
    saved: dict[str, TensorHeader] = {}
    for key, tensor in checkpoint.tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if match := pattern.fullmatch(name):
            parts.setdefault((match["module"], match["weight"]), {})[match["tensor"]] = tensor
        elif match := _BATCH_NORM.fullmatch(name):
            saved[f"{match['module'].removesuffix('.base_layer')}.{match['tensor']}"] = tensor
        elif prefix in name:
            raise InputError(f"{checkpoint.name}: the tensor {key!r} is not part of {title}.")
        else:
            _keep_whole(saved, name, tensor)
    return parts, saved


def _keep_whole(saved: dict[str, TensorHeader], name: str, tensor: TensorHeader) -> None:
    """Note a tensor that replaces the base's.

    With `bias="all"` PEFT stores the bias of a module that is trained whole three times: once as every tensor of such a module,
    once as that of its copy, and that of the original, which is not used.
    """
    if ".original_module." in name:
        return
    plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    if ".modules_to_save." in name:
        saved.setdefault(plain, tensor)
    else:
        saved[plain] = tensor


def read_flora(checkpoint: Checkpoint, model_type: str | None) -> Adapter:
    """Read a FLoRA adapter.

    Raises:
        InputError: tensors that are missing or do not fit each other, by layer.
    """
    parts, saved = by_layer(checkpoint, _FLORA, "flora_", "a FLoRA adapter")
    deltas: dict[str, Delta] = {}
    for (module, weight), tensors in parts.items():
        deltas[f"{module}.{weight or 'weight'}"] = _tucker(checkpoint, module, weight, tensors, model_type)
    return Adapter(deltas, saved, checkpoint.config.get("base_model_name_or_path"), tuple(_bare(checkpoint)))


def is_embedding_module(module: str) -> bool:
    """Whether a module is an embedding, whose weight is stored as `[rows, dim]`; seen from its name."""
    return re.search(r"embed(?!_out)|wte|wpe|shared", module.rpartition(".")[2]) is not None


def _tucker(
    checkpoint: Checkpoint, module: str, weight: str | None, tensors: dict[str, TensorHeader], model_type: str | None
) -> TuckerDelta:
    core = tensors.get("core")
    if core is None or not core.shape:
        raise InputError(f"{checkpoint.name}: {module!r} has no core.")
    modes = tuple(tensors.get(f"factor_{mode}") for mode in range(len(core.shape)))
    for mode, rank in zip(modes, core.shape, strict=True):
        if mode is not None and (len(mode.shape) != 2 or mode.shape[1] != rank):
            raise InputError(f"{checkpoint.name}: {module!r} has a factor {list(mode.shape)} for its core {list(core.shape)}.")
    shape = TuckerDelta(core, modes, 1.0).canonical_shape
    owner = module.replace(".base_layer", "")
    bare = weight is None and any(f".{owner}".endswith(f".{name.rpartition('.')[0]}") for name in _bare(checkpoint))
    matrix = weight is None and not bare and len(core.shape) == 2
    embedding = matrix and is_embedding_module(module)
    scale = _flora_scale(checkpoint, owner, weight, bare)
    if scale is None:
        scale = default_flora_scale(shape, core.shape, embedding, bare)
    return TuckerDelta(core, modes, scale, swapped=embedding or (matrix and model_type in CONV1D_MODELS))


def _bare(checkpoint: Checkpoint) -> list[str]:
    """`target_parameters`: parameters that belong to no layer, such as stacks of experts."""
    return [name for name in checkpoint.config.get("target_parameters") or [] if isinstance(name, str)]


def _flora_scale(checkpoint: Checkpoint, module: str, weight: str | None, bare: bool) -> float | None:
    """The scale that the config gives, by the rules of `SubspaceConfig.for_layer`."""
    if bare and checkpoint.config.get("scale_pattern"):
        raise InputError(f"{checkpoint.name}: a scale_pattern on target_parameters ({module!r}) is not supported.")
    marker = object()
    for key in (f"{module}.{weight or 'weight'}", module):
        scale = _pattern(checkpoint, "scale_pattern", key, marker)
        if scale is not marker:
            return float(scale)
    scale = checkpoint.config.get("scale")
    return None if scale is None else float(scale)


def default_flora_scale(shape: tuple[int, ...], ranks: Iterable[int], embedding: bool, bare: bool) -> float:
    """`peft_subspace.adapters.flora.default_scale`, which cannot be imported without PEFT; a test keeps the two equal."""
    first = next(iter(ranks))
    if embedding:
        return 4 * math.sqrt(first)
    modes = shape[-1:] if bare and len(shape) != 2 else shape[1:]
    return 2 * math.sqrt(2 * first / 3) / math.prod(math.sqrt(size / 2) for size in modes)


def unmatched_text(names: list[str]) -> str:
    """A few names in quotes."""
    return shortened([repr(name) for name in sorted(names)])
