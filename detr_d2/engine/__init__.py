from .optimizer import build_optimizer
from .precision import Precision
from .predictor import DetrPredictor
from .schedule import resolve_epochs
from .step import StepTrainer
from .trainer import DetrTrainer, build_checkpointer

__all__ = [
    "DetrPredictor",
    "DetrTrainer",
    "Precision",
    "StepTrainer",
    "build_checkpointer",
    "build_optimizer",
    "resolve_epochs",
]
