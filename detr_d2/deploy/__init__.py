"""Deployment: the same detector, faster, or as a file that other runtimes read."""

from .export import export_model
from .optimize import load_from_config, optimize_for_inference, prepare_for_inference
from .runtime import ExportedDetr, check_same, is_exported, load_exported

__all__ = [
    "ExportedDetr",
    "check_same",
    "export_model",
    "is_exported",
    "load_exported",
    "load_from_config",
    "optimize_for_inference",
    "prepare_for_inference",
]
