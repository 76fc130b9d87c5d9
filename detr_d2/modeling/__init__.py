"""Importing this package registers the meta-architecture and the backbones in detectron2."""

from .backbone import TimmBackbone
from .build import build_criterion, build_transformer
from .from_config import build_parts
from .meta_arch import Detr
from .registry import CROSS_ATTENTION_REGISTRY, QUERIES_REGISTRY

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "QUERIES_REGISTRY",
    "Detr",
    "TimmBackbone",
    "build_criterion",
    "build_parts",
    "build_transformer",
]
