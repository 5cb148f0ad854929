"""Which fields of an adapter's config its update depends on, for every format that is read. Needs no torch.

Every field of a format's config stands in one of three places, and a test walks them all: `CHANGES` (its value goes into what a
task vector is known by), `NO_EFFECT` (it says how the adapter was trained, where it lies or what its file tells by itself), or
`OTHER_LORA` (an adapter that sets it is refused).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .lora_starts import STARTS

# Options of LoraConfig with which dW is not scale B A, or the adapter is not only dW.
OTHER_LORA = {
    "use_qalora": "QALoRA",
    "lora_bias": "biases on B",
    "layer_replication": "replicated layers",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained single tokens",
}


def _given(value: Any) -> bool:
    return value is not None


def _other_than(default: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value != default


def _takes_a_part(value: Any) -> bool:
    name = str(value).lower()
    return STARTS.get(name, name) is not None


# Kind -> field -> whether a value of it is noted. The fields that were there first are noted whenever they are given, later
# ones where they are no defaults: what was noted before stays the same.
CHANGES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "LORA": {
        **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"), _given),
        "init_lora_weights": _takes_a_part,
        "target_parameters": bool,
    },
    "FLORA": {**dict.fromkeys(("r", "rank_pattern", "scale", "scale_pattern"), _given), "target_parameters": bool},
    "SVFIT": {
        **dict.fromkeys(("r", "rank_pattern", "scale"), _given),
        "nonnegative": bool,
        "svd": _other_than("gram"),
        "basis_dtype": _other_than("auto"),
    },
}
_PEFT = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
}  # fmt: skip
_OURS = {*_PEFT, "dropout", "init_weights", "adapt_batch_norm", "metrics", "peft_subspace_version"}
NO_EFFECT: dict[str, set[str]] = {
    "LORA": {
        *_PEFT, "bias", "lora_dropout", "use_dora", "ensure_weight_tying", "eva_config", "corda_config", "loftq_config",
        "lora_ga_config", "velora_config", "qalora_group_size", "megatron_config", "megatron_core", "runtime_config",
    },
    "FLORA": {*_OURS, "r_spatial", "energy", "lowered_ranks"},
    "SVFIT": {
        *_OURS, "energy", "lowered_ranks", "max_r", "svd_niter", "seed", "svd_device", "save_basis", "form", "bias",
        "target_parameters",
    },
}  # fmt: skip


def changing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an adapter's config that its update depends on; of a format that another package reads, those of ours."""
    kind = str(config.get("peft_type"))
    first = {name: _given for table in CHANGES.values() for name, noted in table.items() if noted is _given}
    fields = CHANGES.get(kind, first)
    return {name: config[name] for name, noted in fields.items() if name in config and noted(config[name])}


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields that a format does not have here and that are set: a newer version may have given them a meaning."""
    kind = str(config.get("peft_type"))
    if kind not in CHANGES:
        return []
    known = {*CHANGES[kind], *NO_EFFECT[kind], *(OTHER_LORA if kind == "LORA" else ())}
    return sorted(name for name, value in config.items() if name not in known and value)
