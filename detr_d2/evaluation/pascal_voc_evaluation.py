"""Pascal VOC's AP, for each class too."""

from collections import OrderedDict

import numpy as np
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.utils import comm

from .per_class import report_per_class_ap


class PerClassPascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """detectron2's evaluator, which returns only the mean over the classes, run class by class.

    This reads and sets its private ``_class_names`` and ``_predictions``; nothing else does.
    """

    def __init__(self, dataset_name: str, output_folder: str | None = None):
        """
        Args:
            dataset_name: data set with ``dirname`` (the folder that holds ``Annotations`` and
                ``ImageSets``), ``split``, ``year`` (2007 or 2012) and ``thing_classes``.
            output_folder: gets ``per_class_ap.json``; None writes no file.
        """
        super().__init__(dataset_name)
        self._output_folder = output_folder

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP", "AP50", "AP75", "AP-<class>", ...}}`` in percent, ``{}`` elsewhere than
        in the main process."""
        class_names, predictions = self._class_names, self._predictions
        per_class = {}
        try:
            for index, name in enumerate(class_names):
                self._class_names = [name]
                self._predictions = {0: predictions[index]} if index in predictions else {}
                # Gathers from all processes, so each of them calls it for each class.
                results = super().evaluate()
                if comm.is_main_process():
                    per_class[name] = {key: float(ap) for key, ap in results["bbox"].items()}
        finally:
            self._class_names, self._predictions = class_names, predictions
        if not comm.is_main_process():
            return {}
        report_per_class_ap({"bbox": per_class}, self._output_folder)
        means = {
            metric: float(np.mean([figures[metric] for figures in per_class.values()]))
            for metric in ("AP", "AP50", "AP75")
        }
        named = {f"AP-{name}": figures["AP"] for name, figures in per_class.items()}
        return OrderedDict(bbox={**means, **named})
