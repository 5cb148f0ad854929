"""`peft-subspace inspect MODEL --spectrum`: the singular values of a model's own weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..task_vectors.errors import InputError, OutputError

if TYPE_CHECKING:
    from ..task_vectors.sources import Checkpoint


def show_weights(checkpoint: Checkpoint, plot: Path | None, quiet: bool) -> None:
    """Print r at 90 and 99 % of the squared norm for every linear layer, or convolution, of a model; draw them if asked.

    Raises:
        InputError: transformers cannot load the folder, or its config is that of another model.
        OutputError: the picture cannot be written.
    """
    import transformers
    from rich.console import Console

    # names of the package, so that it is executed: the command starts with a stand-in for it
    from peft_subspace import draw_spectrum, spectrum_table

    from .exporting import class_of_model

    folder = checkpoint.path
    transformers.utils.logging.set_verbosity_error()
    try:
        cls = getattr(transformers, class_of_model(str(folder)))
        _check_size(checkpoint, cls)
        model = cls.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {error}") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{folder}: {name!r} has values that are NaN or infinite, and so no singular values.")
    spectra = _spectra(model)
    if not quiet:
        Console().print(spectrum_table(spectra))
    if plot is not None:
        try:
            draw_spectrum(spectra, plot)
        except OSError as error:
            raise OutputError(f"{plot}: cannot be written: {error.strerror}.") from error


def _check_size(checkpoint: Checkpoint, cls: Any) -> None:
    """Refuse a config that says nothing of the sizes: transformers would fill up its default, of billions of parameters."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    make = getattr(cls, "_from_config", None) or cls.from_config
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in make(config).parameters())
    held = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if built > 2 * held:
        raise InputError(
            f"{checkpoint.path}: its config.json makes a model of {built:,} parameters, and its files have {held:,}. Get the "
            f"config that the model was saved with."
        )


def _spectra(model: Any) -> Any:
    """Of all linear layers and convolutions but the output head."""
    from peft_subspace import weight_spectra

    problem = None
    for targets in (["all-linear", "all-conv"], "all-linear", "all-conv"):
        try:
            return weight_spectra(model, targets)
        except ValueError as error:  # it has none of one kind
            problem = error
    raise InputError(str(problem))
