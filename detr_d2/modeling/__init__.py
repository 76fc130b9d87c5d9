"""Importing this package registers the meta-architecture and the backbones in detectron2."""

from .backbone import TimmBackbone
from .build import build_criterion, build_parts, build_transformer
from .meta_arch import Detr

__all__ = ["Detr", "TimmBackbone", "build_criterion", "build_parts", "build_transformer"]
