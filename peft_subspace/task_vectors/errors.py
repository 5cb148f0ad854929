"""What can go wrong, by whose hand it is mended; the command line turns each into an exit code."""

from __future__ import annotations


def sentence(error: object) -> str:
    """A message of another place, with a full stop if it has no end."""
    text = str(error).strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


class RecipeError(ValueError):
    """The recipe or the arguments: a typo, a value out of range, things that do not go together."""

    exit_code = 2


class InputError(ValueError):
    """A model or an adapter: damaged, incomplete, of another shape, not a number."""

    exit_code = 3


class OutputError(ValueError):
    """The folder that is written: no space, there already, or of another merge."""

    exit_code = 4


class VerifyError(ValueError):
    """A merged folder, or an input of it, is not what its manifest says."""

    exit_code = 5
