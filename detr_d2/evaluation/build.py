"""The evaluator of a data set, chosen by its ``evaluator_type``."""

import os
import types

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..errors import UserError
from .coco_evaluation import COCODetectionEvaluator
from .lvis_evaluation import PerClassLVISEvaluator
from .panoptic_evaluation import PanopticEvaluator
from .pascal_voc_evaluation import PerClassPascalVOCEvaluator


def build_evaluator(
    cfg: CfgNode | None,
    dataset_name: str,
    output_folder: str | None = None,
    *,
    masks: bool | None = None,
    panoptic: bool | None = None,
    max_detections_per_image: int | None = None,
) -> DatasetEvaluator:
    """Build the evaluator that the data set's metadata asks for.

    Args:
        cfg: gives the default of `output_folder`, ``OUTPUT_DIR/inference``, and below it a folder
            for each data set where ``DATASETS.TEST`` names several.
        dataset_name: registered data set whose metadata has ``evaluator_type`` "coco",
            "coco_panoptic_seg", "lvis" or "pascal_voc".
        output_folder: folder for results; None without a cfg writes no file.
        masks, panoptic: of data sets in COCO's format, whether to evaluate masks of instances, and
            panoptic quality where there are such annotations; by default what the cfg's model
            gives, without a cfg neither. (LVIS evaluates the masks it is given, VOC none.)
        max_detections_per_image: in COCO's metrics, of each class; by default the cfg's
            ``TEST.MAX_EVALUATED_DETECTIONS``, without a cfg 100. Published AP is with 100, also
            that of models which return 300 (``TEST.DETECTIONS_PER_IMAGE``).

    Raises:
        UserError: no such ``evaluator_type``, or metadata or a package which that evaluator needs
            is missing.
    """
    if output_folder is None and cfg is not None:
        own_folder = dataset_name if len(cfg.DATASETS.TEST) > 1 else ""
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", own_folder)
    if masks is None:
        masks = cfg is not None and cfg.MODEL.MASK_ON
    if max_detections_per_image is None:
        limit_of = {} if cfg is None else cfg.TEST
        max_detections_per_image = limit_of.get("MAX_EVALUATED_DETECTIONS", 100)
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type in ("coco", "coco_panoptic_seg"):
        tasks = ("bbox", "segm") if masks else ("bbox",)
        instances = COCODetectionEvaluator(
            dataset_name,
            output_folder,
            tasks=tasks,
            max_detections_per_image=max_detections_per_image,
        )
        if evaluator_type == "coco":
            return instances
        if panoptic is None:
            panoptic = cfg is not None and cfg.MODEL.DETR.PANOPTIC.ENABLED
        if not panoptic:
            return instances
        _require_metadata(dataset_name, "panoptic_json", "panoptic_root")
        return DatasetEvaluators([instances, PanopticEvaluator(dataset_name, output_folder)])
    if evaluator_type == "lvis":
        _require_metadata(dataset_name, "json_file")
        _prepare_lvis_package()
        return PerClassLVISEvaluator(dataset_name, output_folder)
    if evaluator_type == "pascal_voc":
        _require_metadata(dataset_name, "dirname", "split", "year", "thing_classes")
        return PerClassPascalVOCEvaluator(dataset_name, output_folder)
    raise UserError(
        f"Data set '{dataset_name}' has the evaluator_type {evaluator_type!r}; set "
        f"MetadataCatalog.get('{dataset_name}').evaluator_type to 'coco', 'coco_panoptic_seg', "
        "'lvis' or 'pascal_voc'."
    )


def _require_metadata(dataset_name: str, *keys: str) -> None:
    metadata = MetadataCatalog.get(dataset_name)
    missing = [key for key in keys if metadata.get(key) is None]
    if missing:
        raise UserError(
            f"Data set '{dataset_name}' cannot be evaluated without {', '.join(missing)}; set "
            f"them with MetadataCatalog.get('{dataset_name}').set({missing[0]}=...)."
        )


def _prepare_lvis_package() -> None:
    """Say how to get the package where it is missing, and make it work with numpy 1.24 and later.

    lvis 0.5.3, the newest, calls ``np.float``, which numpy has removed. Its one module that does so
    gets a numpy with that name; numpy itself is left as it is.
    """
    try:
        import lvis
    except ImportError as error:
        raise UserError(
            "The package lvis is needed here and not installed: pip install --no-deps lvis (it "
            "asks for an OpenCV that needs a display)."
        ) from error
    if not hasattr(lvis.eval.np, "float"):
        numpy_with_float = types.ModuleType("numpy", "numpy with its former alias numpy.float")
        numpy_with_float.__dict__.update({**vars(np), "float": float})
        lvis.eval.np = numpy_with_float
