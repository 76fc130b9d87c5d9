"""What every evaluator does with the figures of single classes: a table in the log, and a file."""

import json
import logging
import math
import os

from detectron2.utils.file_io import PathManager
from tabulate import tabulate

FILE_NAME = "per_class_ap.json"

logger = logging.getLogger(__name__)


def report_per_class_ap(
    per_class: dict[str, dict[str, dict[str, float]]], output_folder: str | None
) -> None:
    """Log a table for each task; write all of them to ``per_class_ap.json`` in `output_folder`.

    Args:
        per_class: ``{task: {class name: {metric: percent}}}``. NaN is written as null, since JSON
            has no NaN.
        output_folder: made if missing; None writes no file.
    """
    for task, classes in per_class.items():
        rows = [{"class": name, **metrics} for name, metrics in classes.items()]
        table = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".3f", numalign="right")
        logger.info("Per-class %s AP:\n%s", task, table)
    if output_folder is None:
        return
    PathManager.mkdirs(output_folder)
    path = os.path.join(output_folder, FILE_NAME)
    with PathManager.open(path, "w") as file:
        json.dump(_without_nan(per_class), file, indent=1)
    logger.info("Per-class AP written to %s", path)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if math.isnan(value) else value
