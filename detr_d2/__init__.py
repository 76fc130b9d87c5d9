"""DETR as a plug-in of detectron2.

Importing this package registers the meta-architecture, the backbones and the embedded data set in
detectron2's registries.
"""

import sys
from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ImportError(
        f"detr_d2 needs detectron2, which is not installed in {sys.prefix}. In a checkout of this "
        f'project run\n    python tools/setup_env.py --venv "{sys.prefix}"\n'
        "(no compiler needed), or, with torch and a C++ compiler installed,\n"
        f'    "{sys.executable}" -m pip install --no-build-isolation '
        "'git+https://github.com/facebookresearch/detectron2.git'"
    )

from . import model_zoo, modeling
from .config import add_detr_config, get_detr_cfg
from .data import register_coco_dataset, register_digit_panoptic, register_digit_scenes
from .deploy import export_model, load_exported, optimize_for_inference

register_digit_scenes()
register_digit_panoptic()

__version__ = "0.1.0"
__all__ = [
    "add_detr_config",
    "export_model",
    "get_detr_cfg",
    "load_exported",
    "model_zoo",
    "modeling",
    "optimize_for_inference",
    "register_coco_dataset",
]
