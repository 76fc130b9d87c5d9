"""Configs and published weights by name, as in `detectron2.model_zoo`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from .checkpoint import load_weights
from .checkpoint.package_files import PackageFileHandler
from .config import get_detr_cfg
from .data import classes_of
from .data.classes import names_of
from .errors import UserError
from .processor import usable_device

_OFFICIAL = "https://dl.fbaipublicfiles.com/detr/"

# Weights published by the authors of each model, or lying beside the config.
CHECKPOINTS = {
    "COCO-Detection/detr_R_50_500ep": _OFFICIAL + "detr-r50-e632da11.pth",
    "COCO-Detection/detr_R_50_DC5_500ep": _OFFICIAL + "detr-r50-dc5-f0fb7ef5.pth",
    "COCO-Detection/detr_R_101_500ep": _OFFICIAL + "detr-r101-2c7b67e5.pth",
    "COCO-Detection/detr_R_101_DC5_500ep": _OFFICIAL + "detr-r101-dc5-a2e86def.pth",
    "COCO-PanopticSegmentation/detr_R_50": _OFFICIAL + "detr-r50-panoptic-00ce5173.pth",
    "COCO-PanopticSegmentation/detr_R_50_DC5": _OFFICIAL + "detr-r50-dc5-panoptic-da08f1b1.pth",
    "COCO-PanopticSegmentation/detr_R_101": _OFFICIAL + "detr-r101-panoptic-40021d53.pth",
    "DigitScenes/detr_tiny": "detr_d2://DigitScenes/detr_tiny.safetensors",
    "DigitScenes/fast_small": "detr_d2://DigitScenes/fast_small.safetensors",
    "DigitScenes/fast_small_masks": "detr_d2://DigitScenes/fast_small_masks.safetensors",
}


def config_folder() -> Path:
    """Where the configs lie: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


class ZooFileHandler(PackageFileHandler):
    """Resolves ``detr_d2://`` paths: files beside the configs, wherever those are installed."""

    prefix = "detr_d2://"

    def _locate(self, path: str) -> tuple[Path, str]:
        return config_folder().resolve(), path.removeprefix(self.prefix)


PathManager.register_handler(ZooFileHandler())


def get_config_file(config_path: str) -> str:
    """Path of a config.

    Args:
        config_path: relative to `configs/`, e.g. "COCO-Detection/detr_R_50_500ep.yaml".

    Raises:
        UserError: there is none of that name.
    """
    path = config_folder() / config_path
    if not path.is_file():
        files = [p for suffix in ("yaml", "py") for p in config_folder().rglob(f"*.{suffix}")]
        names = [p.relative_to(config_folder()).as_posix() for p in files]
        close = ", ".join(get_close_matches(config_path, names))
        raise UserError(
            f"The model zoo has no config {config_path!r}: "
            + (f"did you mean {close}?" if close else f"they lie in {config_folder()}.")
        )
    return str(path)


def get_checkpoint_url(config_path: str) -> str:
    """URL, or path of a file, of the weights trained with a config; for `MODEL.WEIGHTS`.

    Raises:
        UserError: no weights are published for it.
    """
    name = config_path.removesuffix(".yaml").removesuffix(".py")
    if name not in CHECKPOINTS:
        raise UserError(f"The model zoo has no trained weights for {config_path!r}.")
    return CHECKPOINTS[name]


def trained_weights(config_file: str) -> str | None:
    """URL or path of the weights trained with a config file of the zoo; None for other files."""
    path = Path(config_file).resolve()
    if not path.is_relative_to(config_folder().resolve()):
        return None
    name = path.relative_to(config_folder().resolve()).as_posix()
    return get_checkpoint_url(name) if name.removesuffix(".yaml") in CHECKPOINTS else None


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """Config of a model: a CfgNode from `.yaml`, a LazyConfig from `.py`.

    Args:
        config_path: see `get_config_file`.
        trained: set `MODEL.WEIGHTS` (`train.init_checkpoint`) to the trained weights instead of
            those training starts from.

    Raises:
        UserError: there is no such config, or no trained weights for it.
    """
    if config_path.endswith(".py"):
        lazy = LazyConfig.load(get_config_file(config_path))
        if trained:
            lazy.train.init_checkpoint = get_checkpoint_url(config_path)
        return lazy
    cfg = get_detr_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model with its weights loaded, in training mode as in detectron2.

    Args:
        config_path, trained: see `get_config`.
        device: where to put it; by default the config's, or the CPU on a machine without GPU.

    Raises:
        UserError: there is no such config, or no trained weights for it.
    """
    cfg = get_config(config_path, trained)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or usable_device(cfg.MODEL.DEVICE)
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
        names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    else:
        model = instantiate(cfg.model).to(device or usable_device(cfg.train.device))
        weights, names = cfg.train.init_checkpoint, names_of(cfg.dataloader.train)
    if weights:
        load_weights(model, weights, classes_of(names[:1]))
    return model
