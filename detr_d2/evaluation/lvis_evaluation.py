"""LVIS's AP, for each class too."""

import json
import os

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator
from detectron2.utils.file_io import PathManager

from .per_class import report_per_class_ap

# LVIS counts more detections per image than COCO (Gupta et al., 2019).
MAX_DETECTIONS = 300


class PerClassLVISEvaluator(LVISEvaluator):
    """detectron2's evaluator, which discards the APs of the classes: they are computed once more
    from the result file that it writes."""

    def __init__(self, dataset_name: str, output_folder: str | None = None):
        """
        Args:
            dataset_name: data set with the annotation file ``json_file``.
            output_folder: gets the results and ``per_class_ap.json``; None writes no file, and then
                there is no AP per class.
        """
        super().__init__(dataset_name, output_dir=output_folder)
        self.annotation_file = PathManager.get_local_path(
            MetadataCatalog.get(dataset_name).json_file
        )
        self.output_folder = output_folder

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """LVIS's figures and ``AP-<class>``, in percent; None but in the main process."""
        results = super().evaluate()
        if not results or "bbox" not in results or self.output_folder is None:
            return results
        per_class = self._per_class()
        report_per_class_ap({"bbox": per_class}, self.output_folder)
        named = {f"AP-{name}": figures["AP"] for name, figures in per_class.items()}
        return {**results, "bbox": {**results["bbox"], **named}}

    def _per_class(self) -> dict[str, dict[str, float]]:
        from lvis import LVIS, LVISEval, LVISResults

        file = os.path.join(self.output_folder, "lvis_instances_results.json")
        with PathManager.open(file) as stream:
            detections = json.load(stream)
        if not detections:
            return {}
        truth = LVIS(self.annotation_file)
        evaluation = LVISEval(truth, LVISResults(truth, detections, MAX_DETECTIONS), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        # (T, R, K, A): IoU thresholds from 0.5, recalls, classes, areas (all first).
        precision = evaluation.eval["precision"][:, :, :, 0]
        names = [truth.cats[category]["name"] for category in evaluation.params.cat_ids]
        return {
            name: {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
            for k, name in enumerate(names)
        }


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(100 * known.mean()) if known.size else float("nan")
