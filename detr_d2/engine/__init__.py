from .optimizer import build_optimizer
from .schedule import resolve_epochs
from .trainer import DetrTrainer

__all__ = ["DetrTrainer", "build_optimizer", "resolve_epochs"]
