"""One file per method: its config and its Delta. Importing a file registers the method with PEFT."""

from .flora import FloraConfig, FloraDelta, FloraModel

__all__ = ["FloraConfig", "FloraDelta", "FloraModel"]
