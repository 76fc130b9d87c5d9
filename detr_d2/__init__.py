"""DETR as a plug-in of detectron2.

Importing this package registers the meta-architecture, the backbones and the embedded data set in
detectron2's registries.
"""

from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ImportError(
        "detr_d2 needs detectron2, which is not on the package index under its own name. Install "
        "it with: pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git' "
        "(needs torch and a C++ compiler), or without a compiler: python tools/setup_env.py"
    )

from . import model_zoo, modeling
from .config import add_detr_config, get_detr_cfg
from .data import register_coco_dataset, register_digit_scenes

register_digit_scenes()

__version__ = "0.1.0"
__all__ = ["add_detr_config", "get_detr_cfg", "model_zoo", "modeling", "register_coco_dataset"]
