"""`peft-subspace inspect MODEL --spectrum`: the singular values of a model's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..task_vectors.errors import InputError, OutputError


def show_weights(folder: Any, plot: Path | None, quiet: bool) -> None:
    """Print r at 90 and 99 % of the squared norm for every linear layer, or convolution, of a model; draw them if asked.

    Raises:
        InputError: transformers cannot load the folder.
        OutputError: the picture cannot be written.
    """
    import transformers
    from rich.console import Console

    # names of the package, so that it is executed: the command starts with a stand-in for it
    from peft_subspace import draw_spectrum, spectrum_table

    from .exporting import class_of_model

    transformers.utils.logging.set_verbosity_error()
    try:
        model = getattr(transformers, class_of_model(folder)).from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {error}") from error
    spectra = _spectra(model)
    if not quiet:
        Console().print(spectrum_table(spectra))
    if plot is not None:
        try:
            draw_spectrum(spectra, plot)
        except OSError as error:
            raise OutputError(f"{plot}: cannot be written: {error.strerror}.") from error


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
