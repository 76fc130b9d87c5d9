"""Panoptic quality (Kirillov et al., 2019), computed by hotcoco."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import tempfile
from collections import OrderedDict
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from PIL import Image

from ..data.segments import id_to_rgb
from ..errors import UserError, require_package

logger = logging.getLogger(__name__)

SPLITS = {"": "All", "_th": "Things", "_st": "Stuff"}


class PanopticEvaluator(DatasetEvaluator):
    """What detectron2's `COCOPanopticEvaluator` computes, under the same names: ``{"panoptic_seg":
    {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st"}}`` in percent. That one needs panopticapi, which is
    not on the package index; hotcoco gives the same numbers."""

    def __init__(self, dataset_name: str, output_folder: str | None = None):
        """
        Args:
            dataset_name: registered data set with `panoptic_json` and `panoptic_root`.
            output_folder: keeps the predictions, in COCO's panoptic format; None keeps none.

        Raises:
            UserError: hotcoco is not installed.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_folder = output_folder
        require_package("hotcoco", "fast")  # said now, not after the inference
        things = self._metadata.thing_dataset_id_to_contiguous_id
        stuff = self._metadata.stuff_dataset_id_to_contiguous_id
        self._things = {index: identity for identity, index in things.items()}
        self._stuff = {index: identity for identity, index in stuff.items()}
        self.reset()

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keeps the segments of some images, as PNG in memory.

        Raises:
            UserError: the model gives none.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "panoptic_seg" not in output:
                raise UserError(
                    "The model merges no masks, so there is no panoptic quality: set "
                    "MODEL.DETR.PANOPTIC.ENABLED True (give it a model.panoptic), or evaluate "
                    "without (dataloader.evaluator.panoptic=False)."
                )
            segmentation, segments = output["panoptic_seg"]
            name = os.path.splitext(os.path.basename(image["file_name"]))[0] + ".png"
            picture = io.BytesIO()
            Image.fromarray(id_to_rgb(segmentation.cpu().numpy().astype(np.int64))).save(
                picture, format="PNG"
            )
            self._predictions.append(
                {
                    "image_id": image["image_id"],
                    "file_name": name,
                    "png": picture.getvalue(),
                    "segments_info": [self._to_dataset_category(s) for s in segments],
                }
            )

    def _to_dataset_category(self, segment: dict[str, Any]) -> dict[str, Any]:
        ids = self._things if segment["isthing"] else self._stuff
        return {"id": segment["id"], "category_id": ids[segment["category_id"]]}

    def evaluate(self) -> dict[str, dict[str, float]]:
        comm.synchronize()
        predictions = list(itertools.chain(*comm.gather(self._predictions, dst=0)))
        if not comm.is_main_process():
            return {}
        with tempfile.TemporaryDirectory() as temporary:
            folder = self._output_folder or temporary
            results = self._compare(predictions, folder)
        numbers = {
            f"{measure}{suffix}": 100 * results[split][measure.lower()]
            for suffix, split in SPLITS.items()
            for measure in ("PQ", "SQ", "RQ")
        }
        logger.info("Panoptic results:\n%s", create_small_table(numbers))
        return OrderedDict(panoptic_seg=numbers)

    def _compare(self, predictions: list[dict[str, Any]], folder: str) -> dict[str, Any]:
        pictures = os.path.join(folder, "panoptic")
        PathManager.mkdirs(pictures)
        names: set[str] = set()
        for number, prediction in enumerate(predictions):
            if prediction["file_name"] in names:  # images of one name in several folders
                prediction["file_name"] = f"{number}_{prediction['file_name']}"
            names.add(prediction["file_name"])
            with open(os.path.join(pictures, prediction["file_name"]), "wb") as file:
                file.write(prediction.pop("png"))
        from hotcoco.panoptic import pq_compute

        truth = PathManager.get_local_path(self._metadata.panoptic_json)
        with open(truth, encoding="utf-8") as file:
            content = json.load(file)
        found = os.path.join(folder, "panoptic.json")
        with open(found, "w", encoding="utf-8") as file:
            json.dump({**content, "annotations": predictions}, file)
        with contextlib.redirect_stdout(io.StringIO()):
            return pq_compute(
                truth,
                found,
                gt_folder=PathManager.get_local_path(self._metadata.panoptic_root),
                pred_folder=pictures,
            )
