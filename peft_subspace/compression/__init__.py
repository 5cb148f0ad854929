"""Models that have left their original weights behind: structure, export, transformers' files, and the report."""

from .export import export_compressed, is_compressed, load_official
from .modules import LowRank, replace_layers
from .report import CompressionReport, compression_report
from .transformers_format import LowRankFormat

__all__ = [
    "CompressionReport",
    "LowRank",
    "LowRankFormat",
    "compression_report",
    "export_compressed",
    "is_compressed",
    "load_official",
    "replace_layers",
]
