"""Checkpoints: reading any known format safely, recognising it, fitting it, saving atomically."""

from .adapt import fit_checkpoint
from .checkpointer import DetrCheckpointer, load_weights
from .convert import WRITABLE, convert_checkpoint
from .formats import FORMATS, recognise_format
from .read import read_checkpoint
from .report import LoadReport
from .write import write_checkpoint

__all__ = [
    "FORMATS",
    "WRITABLE",
    "DetrCheckpointer",
    "LoadReport",
    "convert_checkpoint",
    "fit_checkpoint",
    "load_weights",
    "read_checkpoint",
    "recognise_format",
    "write_checkpoint",
]
