from .annotations import check_annotations
from .dataset_mapper import DetrDatasetMapper
from .digit_panoptic import register_digit_panoptic
from .digit_scenes import register_digit_scenes
from .register import (
    check_same_classes,
    classes_of,
    load_dataset,
    parse_register_argument,
    register_coco_dataset,
)

__all__ = [
    "DetrDatasetMapper",
    "check_annotations",
    "check_same_classes",
    "classes_of",
    "load_dataset",
    "parse_register_argument",
    "register_coco_dataset",
    "register_digit_panoptic",
    "register_digit_scenes",
]
