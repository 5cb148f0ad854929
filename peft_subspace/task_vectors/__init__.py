"""Task vectors: what a fine-tuned model, a LoRA or another adapter adds to its base. Importing it imports no torch."""

from .errors import InputError, OutputError, RecipeError, VerifyError

__all__ = ["InputError", "OutputError", "RecipeError", "VerifyError"]
