"""Evaluators for COCO, LVIS and Pascal VOC, chosen by a data set's ``evaluator_type``."""

from .build import build_evaluator
from .coco_evaluation import COCODetectionEvaluator
from .coco_metrics import COCOMetrics, compute_coco_metrics
from .pascal_voc_evaluation import PerClassPascalVOCEvaluator

__all__ = [
    "COCODetectionEvaluator",
    "COCOMetrics",
    "PerClassPascalVOCEvaluator",
    "build_evaluator",
    "compute_coco_metrics",
]
