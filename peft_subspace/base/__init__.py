"""Everything that an adapter shares with PEFT, written once. No method's name appears here."""

from .config import SubspaceConfig
from .delta import Delta
from .geometry import Geometry, describe
from .layer import SubspaceLayer
from .model import SubspaceModel

__all__ = ["Delta", "Geometry", "SubspaceConfig", "SubspaceLayer", "SubspaceModel", "describe"]
