"""Which data sets a config names, and how many classes a model has by them and by the config."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from ..errors import UserError
from .register import classes_of


def names_of(loader: DictConfig) -> list[str]:
    """The data sets of a loader's LazyConfig, which may name a single one without a list, or, where
    it is of another kind, none."""
    names = OmegaConf.select(loader, "dataset.names", default=[])
    return [names] if isinstance(names, str) else list(names)


def dataset_names(cfg: CfgNode, *splits: str) -> list[str]:
    """
    Args:
        splits: "TRAIN", "TEST".

    Raises:
        UserError: the comma of a tuple with one name is missing.
    """
    for split in splits:
        if isinstance(cfg.DATASETS[split], str):
            name = cfg.DATASETS[split]
            raise UserError(f"DATASETS.{split} is the text {name!r}: write ({name!r},), a tuple.")
    return [name for split in splits for name in cfg.DATASETS[split]]


def resolve_num_classes(cfg: CfgNode) -> int:
    """`MODEL.DETR.NUM_CLASSES`, or where that is 0 the number of classes of the data sets.

    Raises:
        UserError: nothing says how many classes there are.
    """
    if cfg.MODEL.DETR.NUM_CLASSES > 0:
        return cfg.MODEL.DETR.NUM_CLASSES
    return compare_num_classes(0, dataset_names(cfg, "TRAIN", "TEST")[:1])


def settle_num_classes(cfg: CfgNode, dataset_names: Sequence[str]) -> CfgNode:
    """The config with `MODEL.DETR.NUM_CLASSES` filled in, so that what is saved says it.

    Args:
        dataset_names: the data sets that will be used; they must agree with each other and with
            the config.

    Raises:
        UserError: they do not, or nothing says how many classes there are.
    """
    settled = cfg.clone()
    settled.defrost()
    settled.MODEL.DETR.NUM_CLASSES = compare_num_classes(cfg.MODEL.DETR.NUM_CLASSES, dataset_names)
    if cfg.is_frozen():
        settled.freeze()
    return settled


def compare_num_classes(configured: int, dataset_names: Sequence[str]) -> int:
    """The number of classes that config and data sets agree on.

    Args:
        configured: what the config says; 0 leaves it to the data sets.

    Raises:
        UserError: two data sets, or a data set and the config, disagree; or nothing tells.
    """
    classes = classes_of(dataset_names)
    if classes and configured and configured != len(classes):
        raise UserError(
            f"MODEL.DETR.NUM_CLASSES is {configured}, but the data set {dataset_names[0]!r} has "
            f"{len(classes)} classes: set it to {len(classes)}, or to 0 to take the data set's."
        )
    if not classes and not configured:
        raise UserError(
            "MODEL.DETR.NUM_CLASSES is 0 (as many as the data set has), but DATASETS.TRAIN and "
            "DATASETS.TEST name no data set with classes: set the key to your number of classes."
        )
    return configured or len(classes)
