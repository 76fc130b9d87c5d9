"""The main job behind `tools/train_net.py`: from arguments to a training or an evaluation."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from yaml import YAMLError

from ..checkpoint import DetrCheckpointer
from ..config import get_detr_cfg
from ..data import classes_of, parse_register_argument, register_coco_dataset
from ..data.classes import dataset_names, settle_num_classes
from ..deploy import (
    check_same,
    export_model,
    is_exported,
    load_from_config,
    prepare_for_inference,
)
from ..errors import UserError
from ..model_zoo import trained_weights
from ..modeling.meta_arch import Detr
from ..processor import set_float32_precision, usable_device
from .launch import one_line
from .predictor import DetrPredictor
from .schedule import prefer_command_line
from .trainer import DetrTrainer, build_checkpointer

logger = logging.getLogger(__name__)


def train_or_evaluate(
    args: argparse.Namespace, trainer_class: type[DetrTrainer] = DetrTrainer
) -> dict | None:
    """Runs what the command line asks for, in this process.

    Args:
        trainer_class: `DetrTrainer`, or a subclass with a loader, a mapper, hooks of one's own.

    Returns:
        The metrics of an evaluation; of a training only with TEST.EXPECTED_RESULTS, as detectron2.

    Raises:
        UserError: a wrong file, key or number.
    """
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume, trainer_class)
    trainer = trainer_class(cfg)
    warn_about_output(trainer.checkpointer, args.resume)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def setup(args: argparse.Namespace) -> CfgNode:
    """Starts logging, registers `--register`ed data; the command line's config, checked, frozen.

    Raises:
        UserError: a wrong file, key or number.
    """
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name at least one data set to evaluate on.")
    if args.eval_only:
        prefer_trained_weights(cfg, args.config_file, args.opts[::2])
    with blaming_output("OUTPUT_DIR", cfg.OUTPUT_DIR):
        folder = place_of_config(cfg, args.eval_only).OUTPUT_DIR
        setup_logger(folder, distributed_rank=comm.get_rank(), name="detr_d2")
    register_datasets(args.register, cfg.DATASETS.TEST, cfg.INPUT.SKIP_UNREADABLE_IMAGES)
    splits = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    cfg = settle_num_classes(cfg, dataset_names(cfg, *splits))
    cfg.freeze()
    with blaming_output("OUTPUT_DIR", cfg.OUTPUT_DIR):
        default_setup(place_of_config(cfg, args.eval_only), args)
    set_float32_precision(cfg.FLOAT32_PRECISION)
    logging.getLogger("detectron2.engine.train_loop").addFilter(shorten_user_error)
    return cfg


@contextmanager
def blaming_output(key: str, folder: str) -> Iterator[None]:
    """
    Raises:
        UserError: what is done inside cannot write to the folder that `key` names.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{key} {folder!r} cannot be used: {error}.") from error


def place_of_config(cfg: CfgNode, eval_only: bool) -> CfgNode:
    """An evaluation keeps its config and log beside its results, not in place of a training's."""
    if not eval_only:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference")
    return cfg


def warn_about_output(checkpointer: DetrCheckpointer, resume: bool) -> None:
    """Says what `--resume`, or its absence, means for the folder as it is."""
    found, folder = checkpointer.has_checkpoint(), checkpointer.save_dir
    if resume and not found:
        logger.warning(f"--resume: there is no checkpoint in {folder!r}, the training starts anew.")
    if found and not resume:
        logger.warning(
            f"OUTPUT_DIR {folder!r} holds checkpoints of another training, which this one will "
            "overwrite: --resume goes on with that one, another OUTPUT_DIR keeps it."
        )


def register_datasets(
    arguments: Sequence[str], test_names: Sequence[str], skip_unreadable: bool
) -> None:
    """Registers every `--register NAME=annotations.json:image_dir`. Only for training may images be
    missing.

    Args:
        test_names: of the data sets to evaluate on.
        skip_unreadable: whether a training leaves out images that cannot be read.
    """
    for argument in arguments:
        name, annotations, folder = parse_register_argument(argument)
        may_miss = skip_unreadable and name not in test_names
        register_coco_dataset(name, annotations, folder, allow_missing_images=may_miss)


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """A config file with overrides; on a machine without GPU the device becomes the CPU.

    Raises:
        UserError: the file does not exist or is not yaml, or a key or value is not possible.
    """
    cfg = get_detr_cfg()
    if late := [override for override in overrides if override.startswith("--")]:
        raise UserError(f"{late[0]} must stand before the first KEY VALUE pair ({overrides[0]}).")
    source = f"--config-file {config_file}"
    try:
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        source = "The command line"
        check_keys(cfg, overrides[::2])
        cfg.merge_from_list(overrides)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}.") from error
    except (KeyError, AssertionError, ValueError, YAMLError) as error:
        # A KeyError's text is its message in quotation marks.
        message = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(f"{source}: {message}") from error
    except (TypeError, AttributeError) as error:  # yacs takes for granted that it has a mapping
        raise UserError(
            f"{source} must hold keys with values below them, as the files in configs/ do: {error}."
        ) from error
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    check_names(cfg)
    warn_of_unread_keys(cfg)
    prefer_command_line(cfg, overrides[::2])
    return cfg


def prefer_trained_weights(cfg: CfgNode, config_file: str, overridden: Sequence[str]) -> None:
    """For what does not train: the published weights of the config in place of those that a
    training starts from, unless the command line names others."""
    if "MODEL.WEIGHTS" not in overridden:
        cfg.MODEL.WEIGHTS = trained_weights(config_file) or cfg.MODEL.WEIGHTS


def check_keys(cfg: CfgNode, keys: Sequence[str]) -> None:
    """
    Raises:
        UserError: a key that goes on below a value or ends above one. Of keys that do not exist,
            yacs says so itself.
    """
    for key in keys:
        node = cfg
        for part in key.split("."):
            if not isinstance(node, CfgNode):
                raise UserError(f"The command line: {key} goes on below a value: shorten the key.")
            if part not in node:
                break
            node = node[part]
        else:
            if isinstance(node, CfgNode):
                raise UserError(f"The command line: {key} is a group of keys: name one of them.")


# Groups of detectron2's keys that are of its other models, and what does here what they do there.
UNREAD_KEYS = {
    "MODEL.ROI_HEADS.NUM_CLASSES": "MODEL.DETR.NUM_CLASSES, which may stay 0: the data tells it",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "TEST.SCORE_THRESHOLD, which DetrPredictor reads",
    "MODEL.RETINANET.NUM_CLASSES": "MODEL.DETR.NUM_CLASSES, which may stay 0: the data tells it",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "TEST.SCORE_THRESHOLD, which DetrPredictor reads",
    **dict.fromkeys(
        (
            *("MODEL.ANCHOR_GENERATOR", "MODEL.PROPOSAL_GENERATOR", "MODEL.RPN", "MODEL.RETINANET"),
            *("MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_BOX_CASCADE_HEAD"),
            *("MODEL.ROI_MASK_HEAD", "MODEL.ROI_KEYPOINT_HEAD", "MODEL.KEYPOINT_ON"),
            *("MODEL.SEM_SEG_HEAD", "MODEL.PANOPTIC_FPN", "TEST.AUG", "VIS_PERIOD"),
        ),
        "",
    ),
}


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """Names keys that were set and change nothing here, as detectron2 has them for its other
    models."""
    for key in changed_keys(cfg, get_detr_cfg()):
        for unread, instead in UNREAD_KEYS.items():
            if key == unread or key.startswith(f"{unread}."):
                advice = f": give {instead}" if instead else ""
                logger.warning(f"{key} is for other models, it changes nothing here{advice}.")
                break


def changed_keys(cfg: CfgNode, default: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from changed_keys(value, default[name], f"{prefix}{name}.")
        elif value != default[name]:
            yield f"{prefix}{name}"


def check_names(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: a device, model or backbone that does not exist, or CPU processes on a machine
            that shows GPUs.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if not (isinstance(found, type) and issubclass(found, Detr)):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {name!r}, this script trains 'Detr' and what is derived "
            "from it: give --config-file one of the files in configs/, or one based on them."
        )
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        names = ", ".join(sorted(name for name, _ in BACKBONE_REGISTRY))
        raise UserError(
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}; it must be one of {names}."
        )
    if cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1 and torch.cuda.is_available():
        raise UserError(
            "MODEL.DEVICE is cpu, but detectron2 connects several processes for the GPUs it sees: "
            "hide them with the environment variable CUDA_VISIBLE_DEVICES=''."
        )
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: {error}") from error


def shorten_user_error(record: logging.LogRecord) -> bool:
    """Log filter for detectron2's training loop, which logs the traceback of whatever ends it."""
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.msg, record.exc_info = f"{record.msg} {one_line(record.exc_info[1])}", None
    return True


def evaluate(
    cfg: CfgNode, resume: bool = False, trainer_class: type[DetrTrainer] = DetrTrainer
) -> dict:
    """Evaluates `MODEL.WEIGHTS`, weights or an exported model, or with `resume` the last checkpoint
    of `OUTPUT_DIR`, in the way `MODEL.INFERENCE` says.

    Raises:
        UserError: weights that cannot be used.
    """
    if is_exported(cfg.MODEL.WEIGHTS) and not resume:
        model: nn.Module = load_from_config(cfg)
        for key, size in (("MIN_SIZE_TEST", model.min_size), ("MAX_SIZE_TEST", model.max_size)):
            if size and size != cfg.INPUT[key]:
                logger.warning(f"INPUT.{key} is {cfg.INPUT[key]}; the model is made for {size}.")
        check_same(model, cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT, classes_of(cfg.DATASETS.TEST))
        if cfg.MODEL.MASK_ON and model.mask_threshold is None:
            raise UserError(f"'{cfg.MODEL.WEIGHTS}' has no masks: set MODEL.MASK_ON False.")
        if cfg.MODEL.DETR.PANOPTIC.ENABLED and model.panoptic is None:
            raise UserError(
                f"'{cfg.MODEL.WEIGHTS}' merges no masks: set MODEL.DETR.PANOPTIC.ENABLED False."
            )
    else:
        model = prepare_for_inference(cfg, load_trained(cfg, resume, trainer_class))
    results = trainer_class.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def load_trained(
    cfg: CfgNode, resume: bool = False, trainer_class: type[DetrTrainer] = DetrTrainer
) -> nn.Module:
    """The model with `MODEL.WEIGHTS`, or with `resume` the last checkpoint of `OUTPUT_DIR`.

    Raises:
        UserError: weights that cannot be used.
    """
    model = trainer_class.build_model(cfg)
    checkpointer = build_checkpointer(cfg, model, cfg.DATASETS.TEST)
    checkpointer.new_class_head = False  # a new head is for the start of a training
    path = last_checkpoint(checkpointer) if resume else cfg.MODEL.WEIGHTS
    if not path:
        raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to evaluate.")
    checkpointer.load(path, checkpointables=[])
    checkpointer.report.refuse_untrained(path)
    return model


def last_checkpoint(checkpointer: DetrCheckpointer) -> str:
    """
    Raises:
        UserError: there is none, and whatever else was evaluated would be taken for it.
    """
    file = checkpointer.last_checkpoint()
    if file is None:
        raise UserError(
            f"--resume: there is no checkpoint in {checkpointer.save_dir!r} to evaluate: correct "
            "the folder, or leave --resume out and name weights."
        )
    return file


def export(config_file: str, path: str, overrides: list[str]) -> None:
    """Writes a trained model for other runtimes, see `export_model`.

    Raises:
        UserError: a wrong file, key or number.
    """
    cfg = load_config(config_file, overrides)
    prefer_trained_weights(cfg, config_file, overrides[::2])
    if is_exported(cfg.MODEL.WEIGHTS):
        raise UserError(
            f"MODEL.WEIGHTS is '{cfg.MODEL.WEIGHTS}', which is exported already: name the "
            "checkpoint that it was exported from."
        )
    cfg.MODEL.DEVICE = "cpu"
    settings = cfg.MODEL.INFERENCE
    settings.BACKEND, settings.DTYPE, settings.COMPILE = "none", "float32", False
    setup_logger(name="detr_d2")
    predictor = DetrPredictor(cfg)
    export_model(
        predictor.model,
        path,
        predictor.metadata.get("thing_classes"),
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
    )
