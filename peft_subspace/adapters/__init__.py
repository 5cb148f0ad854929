"""One file per method: its config and its Delta. Importing a file registers the method with PEFT."""

from .atlas import AtlasConfig, AtlasDelta, AtlasModel
from .concrete import ConcreteConfig, ConcreteDelta, ConcreteModel
from .flora import FloraConfig, FloraDelta, FloraModel
from .pela import PelaConfig, PelaDelta, PelaModel
from .svfit import SvfitConfig, SvfitDelta, SvfitModel

__all__ = [
    "AtlasConfig",
    "AtlasDelta",
    "AtlasModel",
    "ConcreteConfig",
    "ConcreteDelta",
    "ConcreteModel",
    "FloraConfig",
    "FloraDelta",
    "FloraModel",
    "PelaConfig",
    "PelaDelta",
    "PelaModel",
    "SvfitConfig",
    "SvfitDelta",
    "SvfitModel",
]
