"""Evaluation of boxes (and masks) by COCO's rules, on public interfaces of detectron2 only."""

import itertools
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from ..data.coco_json import JSON_ENCODING, is_crowd
from ..errors import UserError
from .coco_metrics import choose_backend, compute_coco_metrics
from .per_class import report_per_class_ap

logger = logging.getLogger(__name__)


class COCODetectionEvaluator(DatasetEvaluator):
    """detectron2's `COCOEvaluator` for boxes and masks, with a fast back end and AP for each class.

    Results have the same names and values: ``{"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl",
    "AP-<class>", ...}}`` in percent. detectron2's own class cannot be given another back end, nor
    another limit on the detections per image without its slow path.
    """

    def __init__(
        self,
        dataset_name: str,
        output_folder: str | None = None,
        *,
        tasks: Sequence[str] = ("bbox",),
        max_detections_per_image: int = 100,
        distributed: bool = True,
        backend: str | None = None,
    ):
        """
        Args:
            dataset_name: registered data set. Without a COCO annotation file (``json_file``) it is
                converted to one in `output_folder`.
            output_folder: gets ``coco_instances_results.json`` and ``per_class_ap.json``; None
                writes no file.
            tasks: "bbox", "segm" or both.
            max_detections_per_image: COCO's own figures use 100.
            distributed: gather the predictions of all processes; only the main one has results.
            backend: "hotcoco" or "pycocotools"; None takes the faster one installed.

        Raises:
            UserError: the annotation file is missing; said before inference begins.
            UserError: a data set without annotation file, and no folder to write one to.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._output_folder = output_folder
        self._tasks = tuple(tasks)
        self._max_detections_per_image = max_detections_per_image
        self._distributed = distributed
        self._backend = backend
        self._annotation_file = self._find_annotation_file()
        self.reset()

    def reset(self) -> None:
        self._predictions: list[list[dict[str, Any]]] = []  # one list for each image

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Store the detections of some images.

        Args:
            inputs: the images' dictionaries; ``image_id`` is read.
            outputs: ``{"instances": Instances}`` for each, boxes xyxy in pixels of the original.
        """
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(torch.device("cpu"))
            instances = _drop_non_finite(instances, image["image_id"])
            self._predictions.append(instances_to_coco_json(instances, image["image_id"]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Results of the main process, ``{}`` elsewhere and where there is nothing to compare."""
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return {}
        if not predictions:
            logger.warning("Data set '%s': no image was processed.", self._dataset_name)
            return {}

        detections = self._to_dataset_categories(itertools.chain(*predictions))
        self._write_detections(detections)
        with open(self._annotation_file, encoding=JSON_ENCODING) as file:
            ground_truth = json.load(file)
        if "annotations" not in ground_truth:
            logger.info("%s has no annotations to evaluate with.", self._annotation_file)
            return OrderedDict()
        return self._compare(ground_truth, detections)

    def _compare(
        self, ground_truth: dict[str, Any], detections: list[dict[str, Any]]
    ) -> dict[str, dict[str, float]]:
        backend = self._backend or choose_backend(ground_truth)
        limit = self._max_detections_per_image
        logger.info(
            "Evaluating %d detections in '%s' with %s.",
            len(detections),
            self._dataset_name,
            backend,
        )
        if limit != 100:
            logger.warning(
                "AP with up to %d detections per image and class; published COCO figures use 100.",
                limit,
            )
        warn_of_many_objects(ground_truth, limit)
        if not detections:
            logger.warning("The model detected nothing; AP is shown as NaN.")
        results, per_class = OrderedDict(), {}
        for task in self._tasks:
            metrics = compute_coco_metrics(ground_truth, detections, task, limit, backend)
            numbers = metrics.summary()
            logger.info("Results for %s:\n%s", task, create_small_table(numbers))
            per_class[task] = metrics.per_class()
            results[task] = {
                **{name: value for name, value in numbers.items() if name.startswith("AP")},
                **{f"AP-{name}": figures["AP"] for name, figures in per_class[task].items()},
            }
        report_per_class_ap(per_class, self._output_folder)
        return results

    def _find_annotation_file(self) -> str:
        path = self._metadata.get("json_file")
        if path is None:
            if self._output_folder is None:
                raise UserError(
                    f"Data set '{self._dataset_name}' has no COCO annotation file (json_file); "
                    "give the evaluator an output_folder to write one to."
                )
            path = os.path.join(self._output_folder, f"{self._dataset_name}_coco_format.json")
            if self._distributed and not comm.is_main_process():
                return path  # which the main process writes, and alone reads
            convert_to_coco_json(self._dataset_name, path, allow_cached=False)
        path = PathManager.get_local_path(path)
        if not os.path.isfile(path):
            raise UserError(
                f"Annotation file {path} of data set '{self._dataset_name}' does not exist; "
                "correct the path it is registered with."
            )
        return path

    def _to_dataset_categories(self, detections) -> list[dict[str, Any]]:
        """Replace class indices 0..K-1 by the category ids of the annotation file."""
        detections = list(detections)
        contiguous_ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous_ids is None:
            return detections
        category_ids = {index: identity for identity, index in contiguous_ids.items()}
        # Stuff has no instances: of panoptic models' classes only things are detections.
        stuff = self._metadata.get("stuff_dataset_id_to_contiguous_id", {}).values()
        detections = [
            d
            for d in detections
            if d["category_id"] in category_ids or d["category_id"] not in stuff
        ]
        for detection in detections:
            index = detection["category_id"]
            if index not in category_ids:
                raise UserError(
                    f"The model predicts class {index}, but data set '{self._dataset_name}' has "
                    f"{len(category_ids)} classes; set MODEL.DETR.NUM_CLASSES to that number."
                )
            detection["category_id"] = category_ids[index]
        return detections

    def _write_detections(self, detections: list[dict[str, Any]]) -> None:
        if self._output_folder is None:
            return
        PathManager.mkdirs(self._output_folder)
        path = os.path.join(self._output_folder, "coco_instances_results.json")
        with PathManager.open(path, "w") as file:
            json.dump(detections, file)
        logger.info("Detections written to %s", path)


def warn_of_many_objects(ground_truth: dict[str, Any], limit: int) -> None:
    """Objects beyond the limit count as missed, however well they are detected."""
    counts = Counter(
        (a["image_id"], a["category_id"]) for a in ground_truth["annotations"] if not is_crowd(a)
    )
    most = max(counts.values(), default=0)
    if most > limit:
        logger.warning(
            f"There are images with up to {most} objects of a class, of which AP counts {limit} "
            "detections: for all of them raise TEST.MAX_EVALUATED_DETECTIONS, "
            "TEST.DETECTIONS_PER_IMAGE and MODEL.DETR.NUM_OBJECT_QUERIES."
        )


def _drop_non_finite(instances: Instances, image_id: int | str) -> Instances:
    """A score of NaN has no rank, so no AP is defined with it."""
    finite = instances.scores.isfinite() & instances.pred_boxes.tensor.isfinite().all(dim=1)
    if finite.all():
        return instances
    logger.warning(
        "Image %s: %d of %d detections have a score or box that is not finite; they are dropped.",
        image_id,
        int((~finite).sum()),
        len(instances),
    )
    return instances[finite]
