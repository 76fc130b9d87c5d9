"""The main job behind `tools/train_net.py`: from arguments to a training or an evaluation."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..config import get_detr_cfg
from ..data import parse_register_argument, register_coco_dataset
from ..data.classes import check_num_classes
from ..errors import UserError
from .schedule import resolve_epochs
from .trainer import DetrTrainer, build_checkpointer


def train_or_evaluate(args: argparse.Namespace) -> dict | None:
    """Runs what the command line asks for, in this process.

    Returns:
        The metrics, where something was evaluated.

    Raises:
        UserError: a wrong file, key or number.
    """
    for argument in args.register:
        register_coco_dataset(*parse_register_argument(argument))
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    trainer = DetrTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a command line, checked against its data sets and frozen; starts logging."""
    cfg = get_detr_cfg()
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
    except FileNotFoundError as error:
        raise UserError(f"--config-file {args.config_file!r} does not exist.") from error
    except (KeyError, AssertionError, ValueError) as error:
        raise UserError(f"{args.config_file or 'command line'}: {error.args[0]}") from error
    check_num_classes(cfg)
    if not args.eval_only:
        cfg = resolve_epochs(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def evaluate(cfg: CfgNode, resume: bool = False) -> dict:
    """Evaluates `MODEL.WEIGHTS`, or with `resume` the last checkpoint of `OUTPUT_DIR`."""
    model = DetrTrainer.build_model(cfg)
    build_checkpointer(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = DetrTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
