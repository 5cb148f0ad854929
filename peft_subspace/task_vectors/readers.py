"""Which function reads the adapters of a PEFT type. A type without a reader is refused by name.

A reader takes the opened adapter and the `model_type` of the base (None if there is no base), reads headers only, and returns
an `Adapter`. Another package brings its own by an entry point of the group `peft_subspace.adapter_readers` that is called like
the PEFT type. A method whose adapter is no sum on the weights (one that replaces the base's layers) has no reader, or one that
raises an `InputError` with the way out.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from .adapter_fields import unknown_fields
from .errors import InputError

if TYPE_CHECKING:
    from .adapters import Adapter
    from .sources import Checkpoint

GROUP = "peft_subspace.adapter_readers"
READERS = {
    "LORA": "peft_subspace.task_vectors.adapters:read_lora",
    "FLORA": "peft_subspace.task_vectors.adapters:read_flora",
    "SVFIT": "peft_subspace.task_vectors.svfit_files:read_svfit",
}

# Types whose file is no update by itself, and what to do with them
WAYS_OUT = {
    "ATLAS": "Its file has the coefficients of other vectors: load it with PEFT, write what it composes by "
    "`model.base_model.save_task_vector('learned.safetensors')`, and give that file instead.",
    "CONCRETE": "Its file has a mask for other vectors: load it with PEFT, write what it adds by "
    "`model.base_model.save_task_vector('learned.safetensors')`, and give that file instead.",
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE"),
        "It adds inputs of its own and changes no weight, so there is nothing of it to merge.",
    ),
    "PELA": "Its factors stand in for the base's weights: load it with PEFT, `model.merge_and_unload().save_pretrained(...)`, "
    "and give that model instead.",
}


def read_adapter(checkpoint: Checkpoint, model_type: str | None = None) -> Adapter:
    """Read what an adapter changes off its config and the header of its file.

    Args:
        checkpoint: the adapter.
        model_type: of the base's config.json: GPT-2 and a few others store linear weights the other way round.

    Raises:
        InputError: an adapter of a kind that is not a plain sum on the weights, by name; or a file that is not whole.
    """
    found = _reader(checkpoint)(checkpoint, model_type)
    if unknown := unknown_fields(checkpoint.config):
        warnings.warn(
            f"{checkpoint.name}: its config has {', '.join(unknown)}, which this version of peft_subspace does not know and "
            f"leaves out. If what it adds to its model depends on that, merge it into its model first "
            f"(`model.merge_and_unload().save_pretrained(...)`) and give that model instead.",
            stacklevel=2,
        )
    return found


def _reader(checkpoint: Checkpoint) -> Callable[[Checkpoint, str | None], Adapter]:
    kind = str(checkpoint.config.get("peft_type"))
    if kind in READERS:
        module, _, name = READERS[kind].partition(":")
        return getattr(importlib.import_module(module), name)
    brought = {point.name: point for point in entry_points(group=GROUP)}
    if kind in brought:
        return brought[kind].load()
    way_out = WAYS_OUT.get(
        kind, "Merge it into its model first (`model.merge_and_unload().save_pretrained(...)`) and give that model instead."
    )
    accepted = ", ".join((*READERS, *sorted(brought)))
    article = "an" if kind[:1] in "AEIO" else "a"
    raise InputError(f"{checkpoint.name}: is {article} {kind} adapter. Accepted: {accepted}. {way_out}")
