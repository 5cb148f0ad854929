"""Strict loading: an adapter fits the model whole, or the model stays as it was."""

from __future__ import annotations

import difflib
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .ddp_names import keep_from_ddp
from .holders import Holder
from .layer import SubspaceLayer

PEFT_PREFIX = "base_model.model."  # of the keys in an adapter file


def check_state_dict(
    expected: dict[str, Tensor], loaded: dict[str, Any], known: set[str], adapter_name: str, method: str
) -> None:
    """Compare an adapter file with the adapter that it is loaded into.

    Args:
        expected: the model's tensors of this adapter, by their key in the file.
        loaded: the file's tensors.
        known: keys of the model outside the adapter that a file may hold too (heads, resized embeddings).
        adapter_name: for the message.
        method: for the message.

    Raises:
        ValueError: lists missing keys, unexpected keys with the nearest expected name, and tensors of another shape.
    """
    known = {key.removeprefix(PEFT_PREFIX) for key in known}
    wanted = {key.removeprefix(PEFT_PREFIX): tuple(tensor.shape) for key, tensor in expected.items()}
    found = {key.removeprefix(PEFT_PREFIX): tuple(tensor.shape) for key, tensor in loaded.items()}
    problems = []
    if missing := sorted(set(wanted) - set(found)):
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected := sorted(set(found) - set(wanted) - known):
        near = difflib.get_close_matches(unexpected[0], list(wanted), n=1, cutoff=0.5)
        hint = f" (nearest name in the model: {near[0]})" if near else ""
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}{hint}")
    problems += _other_shapes(wanted, found)
    if problems:
        raise _misfit(problems, adapter_name, method)


def complete_adapter(model: nn.Module, loaded: dict[str, Tensor], adapter_name: str) -> None:
    """Make from the base's weights what an adapter file leaves out, now that a misfit can still be told from the file.

    Raises:
        ValueError: names the layer whose weight is not the one that the adapter was trained on.
    """
    found = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in loaded.items()}
    for name, module in model.named_modules():
        if not isinstance(module, SubspaceLayer):
            continue
        name = name.removeprefix(PEFT_PREFIX)
        saved = {
            container: {tensor: found.get(f"{name}.{container}.{tensor}", own) for tensor, own in delta.state_dict().items()}
            for container, delta in module.deltas(adapter_name).items()
        }
        if any(module._weight_device(container).type == "meta" for container in saved):
            continue  # it is looked at when it is there
        try:
            module.complete(adapter_name, saved)
        except ValueError as error:
            raise ValueError(f"The adapter {adapter_name!r} does not fit: {error} The model was left as it was.") from error


def check_saved_modules(model: nn.Module, found: dict[str, tuple[int, ...]], adapter_name: str, method: str) -> None:
    """Look for the whole modules that an adapter brings (`modules_to_save`) among the tensors of its file.

    PEFT looks them up without asking, before `check_state_dict` has its turn.
    """
    if getattr(model, "_checkpoint_conversion_mapping", None):  # PEFT renames the file's keys for these models
        return
    found = {key.removeprefix(PEFT_PREFIX): shape for key, shape in found.items()}
    wanted = {
        f"{name}.{key}": tuple(module.state_dict()[own].shape)
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key, own in module.adapter_state_dict_load_map(adapter_name).items()
    }
    problems = []
    if missing := sorted(set(wanted) - set(found)):
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    problems += _other_shapes(wanted, found)
    if problems:
        raise _misfit(problems, adapter_name, method)


def _other_shapes(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    shapes = [
        f"{key} is {list(found[key])} in the file and {list(wanted[key])} in the model"
        for key in sorted(set(wanted) & set(found))
        if wanted[key] != found[key]
    ]
    return [f"{len(shapes)} of another shape: {_some(shapes)}"] if shapes else []


def _misfit(problems: list[str], adapter_name: str, method: str) -> ValueError:
    return ValueError(
        f"The adapter file does not fit the {method} adapter {adapter_name!r} of this model. {'; '.join(problems)}. "
        f"Load it onto the base model that it was trained on (`base_model_name_or_path` in adapter_config.json), with the "
        f"config that was saved with it. The model was left as it was."
    )


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Undo an injection: delete the adapter, put base layers back where no adapter is left, and thaw what was frozen."""
    for name, module in reversed(list(model.named_modules())):  # inner wrappers before outer ones
        if isinstance(module, BaseTunerLayer):
            others = module._get_available_adapters() - {adapter_name}
            if isinstance(module, Holder) and not others:
                module.take_off()
                continue
            original: Any = module.base_layer  # type: ignore[attr-defined]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            others = module._adapters - {adapter_name}
            original = module.original_module
        else:
            continue
        parent, _, child = name.rpartition(".")
        if not others:
            setattr(model.get_submodule(parent), child, original)
        elif isinstance(module, BaseTunerLayer):
            for container in module.adapter_layer_names:
                if adapter_name in getattr(module, container):  # it need not have come as far as this layer
                    getattr(module, container).pop(adapter_name)
        else:
            active = [name for name in module.active_adapters if name != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=active)
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    for holder in (model, tuner, getattr(tuner, "model", None)):
        configs = getattr(holder, "__dict__", {}).get("peft_config", {})
        configs.pop(adapter_name, None)
    if tuner is not None:
        keep_from_ddp(tuner.model)
    if tuner is not None and not tuner.peft_config:
        for attribute in ("peft_config", "_hf_peft_config_loaded"):  # transformers sets the second before it injects
            tuner.model.__dict__.pop(attribute, None)
        for parameter in tuner.__dict__.get("trainable_before", []):
            parameter.requires_grad_(True)
