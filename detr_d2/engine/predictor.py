"""From one image in memory to its detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint import load_weights, read_checkpoint
from ..checkpoint.class_rows import names_of_rows
from ..data import classes_of
from ..data.classes import compare_num_classes, dataset_names
from ..data.coco_json import DatasetError
from ..data.dataset_mapper import build_augmentation
from ..deploy import ExportedDetr, is_exported, load_from_config, prepare_for_inference
from ..errors import UserError
from ..processor import set_float32_precision, usable_device


class DetrPredictor(DefaultPredictor):
    """`DefaultPredictor` whose `MODEL.WEIGHTS` may be of any format that this package knows, or an
    exported model; it computes in the way `MODEL.INFERENCE` says.

    The data sets need not be registered: checkpoints of this package tell their classes (but for
    panoptic models, whose data set tells things from stuff). An exported model also tells its
    channel order and classes, whatever the config says, and the size of images where the config has
    detectron2's default.

    Called with an image (H, W, 3), uint8, BGR as OpenCV reads it, it returns {"instances":
    Instances} at the image's size, without those of scores below `TEST.SCORE_THRESHOLD`.
    (detectron2's own predictor works with this package's `.pth` files; its checkpointer knows no
    other format and unpickles `.pkl` files without restriction.)

    `model` is an optimised copy, unless `MODEL.INFERENCE.BACKEND` is "none": for counting
    parameters and operations, or loading other weights into it.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            UserError: weights that cannot be used, or nothing tells the number of classes.
        """
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to detect with.")
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
        set_float32_precision(cfg.FLOAT32_PRECISION)
        names = [n for n in dataset_names(cfg, "TEST", "TRAIN") if n in DatasetCatalog][:1]
        self.metadata = MetadataCatalog.get(names[0]) if names else Metadata()
        if is_exported(cfg.MODEL.WEIGHTS):
            self.model = load_from_config(cfg)
            self._follow(self.model)
            classes = self.model.class_names or self.metadata.get("thing_classes")
        else:
            classes = self._class_names(names)
            self.model = self._load(classes)
        if list(self.metadata.get("thing_classes", ())) != list(classes or ()):
            self.metadata = Metadata()
            if classes:
                self.metadata.thing_classes = list(classes)
        settings = self.cfg.INPUT
        [self.aug] = build_augmentation(
            False, min_size=settings.MIN_SIZE_TEST, max_size=settings.MAX_SIZE_TEST
        )
        self.input_format = settings.FORMAT

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """An image (H, W, 3) uint8, BGR, or (H, W, 1) where `INPUT.FORMAT` is "L" ->
        {"instances": Instances}, and "panoptic_seg" of a panoptic model.

        Raises:
            UserError: it is no such image.
        """
        check_image(original_image, channels=1 if self.input_format == "L" else 3)
        result = super().__call__(original_image)
        instances = result["instances"]
        result["instances"] = instances[instances.scores >= self.cfg.TEST.SCORE_THRESHOLD]
        return result

    def _follow(self, model: ExportedDetr) -> None:
        """Takes channel order and size of images, and the device, from an exported model."""
        self.cfg.MODEL.DEVICE = "cpu"
        settings, defaults = self.cfg.INPUT, get_cfg().INPUT
        settings.FORMAT = model.input_format
        for key, size in (("MIN_SIZE_TEST", model.min_size), ("MAX_SIZE_TEST", model.max_size)):
            if size and settings[key] == defaults[key]:
                settings[key] = size

    def _class_names(self, dataset_names: Sequence[str]) -> list[str] | None:
        """Of the data set or else of the checkpoint, as many as the model has classes. The data
        itself comes last: it may be large, or not on this machine.

        Raises:
            UserError: it is not, and nothing else tells the number of classes.
        """
        number = self.cfg.MODEL.DETR.NUM_CLASSES
        names = fitting_names(self.metadata.get("thing_classes"), number)
        if not names:
            told = read_checkpoint(self.cfg.MODEL.WEIGHTS).get("class_names")
            names = fitting_names(told, number)
        if names or "thing_classes" in self.metadata.as_dict():
            return names
        try:
            return fitting_names(classes_of(dataset_names), number)
        except DatasetError:
            if not number:
                raise
            return None

    def _load(self, classes: Sequence[str] | None) -> nn.Module:
        cfg = self.cfg
        if not cfg.MODEL.DETR.NUM_CLASSES:
            num_classes = len(classes) if classes else compare_num_classes(0, [])
            cfg.MODEL.DETR.NUM_CLASSES = num_classes
        model = build_model(cfg).eval()
        report, _ = load_weights(model, cfg.MODEL.WEIGHTS, classes)
        report.refuse_untrained(cfg.MODEL.WEIGHTS)
        return prepare_for_inference(cfg, model)


def fitting_names(names: Sequence[str] | None, number: int) -> list[str] | None:
    """Names of as many classes (0: of any number), else None. COCO's 80 are spread over heads that
    have a row for each category id."""
    rows = names_of_rows(names, number) if names and number else names
    return [name or "N/A" for name in rows] if rows else None


def check_image(image: Any, channels: int = 3) -> None:
    """
    Raises:
        UserError: not an (H, W, channels) uint8 array with pixels in it.
    """
    if image is None:
        raise UserError("The image is None: OpenCV could not read the file, look at its path.")
    is_array = isinstance(image, np.ndarray)
    if is_array and image.size and image.dtype == np.uint8 and image.shape[2:] == (channels,):
        return
    given = f"{image.dtype} of shape {image.shape}" if is_array else type(image).__name__
    order = "." if channels == 1 else ", in BGR order, as cv2.imread returns it."
    raise UserError(
        f"The image is {given}, it must be a uint8 array of shape (height, width, {channels})"
        + order
    )
