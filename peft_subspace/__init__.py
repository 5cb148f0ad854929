"""Subspace methods for Hugging Face PEFT. Importing the package registers its PEFT types."""

from ._version import __version__
from .adapters import (
    AtlasConfig,
    AtlasDelta,
    AtlasModel,
    ConcreteConfig,
    ConcreteDelta,
    ConcreteModel,
    FloraConfig,
    FloraDelta,
    FloraModel,
    PelaConfig,
    PelaDelta,
    PelaModel,
    SvfitConfig,
    SvfitDelta,
    SvfitModel,
)
from .base import Delta, Geometry, SubspaceConfig, SubspaceLayer, SubspaceModel
from .compression import CompressionReport, compression_report, export_compressed, load_official
from .export import save_as_lora, to_lora
from .heat_map import draw_coefficients
from .hub import write_model_card
from .mask_charts import draw_density, draw_history, draw_probabilities
from .registration import check_peft_version, register
from .spectrum import WeightSpectrum, draw_spectrum, spectrum_table, weight_spectra

check_peft_version()

__all__ = [
    "AtlasConfig",
    "AtlasDelta",
    "AtlasModel",
    "CompressionReport",
    "ConcreteConfig",
    "ConcreteDelta",
    "ConcreteModel",
    "Delta",
    "FloraConfig",
    "FloraDelta",
    "FloraModel",
    "Geometry",
    "PelaConfig",
    "PelaDelta",
    "PelaModel",
    "SubspaceConfig",
    "SubspaceLayer",
    "SubspaceModel",
    "SvfitConfig",
    "SvfitDelta",
    "SvfitModel",
    "WeightSpectrum",
    "__version__",
    "draw_coefficients",
    "compression_report",
    "draw_density",
    "draw_history",
    "draw_probabilities",
    "draw_spectrum",
    "export_compressed",
    "load_official",
    "register",
    "save_as_lora",
    "spectrum_table",
    "to_lora",
    "weight_spectra",
    "write_model_card",
]
