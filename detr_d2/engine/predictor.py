"""From one image in memory to its detections."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from ..data.dataset_mapper import build_augmentation
from .trainer import build_checkpointer


class DetrPredictor(DefaultPredictor):
    """`DefaultPredictor` whose `MODEL.WEIGHTS` may be of any format that this package knows.

    detectron2's own works too, with this package's `.pth` files; its checkpointer knows no other
    format and unpickles `.pkl` files without restriction. Called with an image (H, W, 3), uint8,
    BGR as OpenCV reads it, it returns {"instances": Instances} at the image's size.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
        if names:
            self.metadata = MetadataCatalog.get(names[0])
        build_checkpointer(cfg, self.model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        [self.aug] = build_augmentation(
            False, min_size=cfg.INPUT.MIN_SIZE_TEST, max_size=cfg.INPUT.MAX_SIZE_TEST
        )
        self.input_format = cfg.INPUT.FORMAT
