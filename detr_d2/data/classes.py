"""How many classes a model has: what the data sets say, and what the config says."""

from __future__ import annotations

from detectron2.config import CfgNode

from ..errors import UserError
from .register import check_same_classes, classes_of


def resolve_num_classes(cfg: CfgNode) -> int:
    """`MODEL.DETR.NUM_CLASSES`, or where that is 0 the number of classes of the data sets.

    Raises:
        UserError: nothing says how many classes there are.
    """
    if cfg.MODEL.DETR.NUM_CLASSES > 0:
        return cfg.MODEL.DETR.NUM_CLASSES
    classes = classes_of([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][:1])
    if not classes:
        raise UserError(
            "MODEL.DETR.NUM_CLASSES is 0 (as many as the data set has), but DATASETS.TRAIN and "
            "DATASETS.TEST name no data set with classes: set the key to your number of classes."
        )
    return len(classes)


def check_num_classes(cfg: CfgNode) -> None:
    """Compares the config with its data sets, before anything is built.

    Raises:
        UserError: two data sets, or a data set and the config, disagree.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_same_classes(names)
    classes = classes_of(names[:1])
    configured = cfg.MODEL.DETR.NUM_CLASSES
    if classes and configured and configured != len(classes):
        raise UserError(
            f"MODEL.DETR.NUM_CLASSES is {configured}, but the data set {names[0]!r} has "
            f"{len(classes)} classes: set it to {len(classes)}, or to 0 to take the data set's."
        )
