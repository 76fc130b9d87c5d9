"""The main job behind `tools/lazyconfig_train_net.py`: LazyConfigs instead of yaml."""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from detectron2.utils.registry import locate
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..checkpoint import DetrCheckpointer
from ..data import classes_of
from ..data.classes import names_of
from ..errors import UserError
from ..processor import set_float32_precision, usable_device
from .hooks import BestCheckpointer, PeriodicCheckpointer
from .main import (
    blaming_output,
    last_checkpoint,
    register_datasets,
    shorten_user_error,
    warn_about_output,
)
from .precision import Precision
from .step import StepTrainer, share_statistics
from .trainer import refuse_untrained_detector

_MISSING = object()


def train_or_evaluate(args: argparse.Namespace) -> dict | None:
    """Runs what the command line asks for, in this process.

    Returns:
        The metrics of the last evaluation.

    Raises:
        UserError: a wrong file, key or number.
    """
    cfg = setup(args)
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        evaluated = [cfg.dataloader.evaluator.dataset_name]
        checkpointer = build_checkpointer(cfg, model, evaluated, as_text(cfg))
        path = last_checkpoint(checkpointer) if args.resume else cfg.train.init_checkpoint
        if not path:
            raise UserError("train.init_checkpoint is empty: name the checkpoint to evaluate.")
        checkpointer.load(path, checkpointables=[])
        checkpointer.report.refuse_untrained(path, "train.init_checkpoint")
        return evaluate(cfg, model)
    return train(cfg, model, args.resume)


def setup(args: argparse.Namespace) -> Any:
    """The config of a command line; starts logging and registers `--register`ed data.

    Raises:
        UserError: a wrong file, key or number.
    """
    if not os.path.isfile(args.config_file):
        raise UserError(f"--config-file {args.config_file!r} does not exist.")
    try:
        cfg = LazyConfig.load(args.config_file)
        check_overrides(cfg, args.opts)
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (AssertionError, OverrideParseException, OmegaConfBaseException) as error:
        raise UserError(f"{args.config_file} with {' '.join(args.opts)}: {error}") from error
    cfg.train.device = usable_device(cfg.train.device)
    if cfg.train.seed is None:
        cfg.train.seed = -1  # how detectron2 writes that one is to be drawn
    saved = copy.deepcopy(cfg)
    if args.eval_only:  # beside its results, not in place of a training's
        saved.train.output_dir = os.path.join(cfg.train.output_dir, "inference")
    with blaming_output("train.output_dir", cfg.train.output_dir):
        default_setup(saved, args)
        setup_logger(saved.train.output_dir, distributed_rank=comm.get_rank(), name="detr_d2")
    set_float32_precision(cfg.train.get("float32_precision") or "")
    logging.getLogger("detectron2.engine.train_loop").addFilter(shorten_user_error)
    evaluator = cfg.dataloader.evaluator
    # This package's evaluators and detectron2's call it by other names.
    for folder in {"output_folder", "output_dir"} & set(parameters_of(evaluator)):
        if OmegaConf.select(evaluator, folder) is None:
            evaluator[folder] = os.path.join(cfg.train.output_dir, "inference")
    tested = names_of(cfg.dataloader.test) or [evaluator.dataset_name]
    if tested != [evaluator.dataset_name]:
        raise UserError(
            f"dataloader.test.dataset.names is {tested}, and dataloader.evaluator.dataset_name "
            f"{evaluator.dataset_name!r}: name the same data set in both."
        )
    skips = OmegaConf.select(cfg, "dataloader.train.mapper.skip_unreadable_images", default=False)
    register_datasets(args.register, tested, skips)
    trained = [] if args.eval_only else names_of(cfg.dataloader.train)
    check_num_classes(cfg, [*trained, *tested])
    return cfg


def as_text(cfg: Any) -> str:
    """As Python; as yaml where it was read from such a file, whose targets are names."""
    try:
        return LazyConfig.to_py(cfg)
    except AttributeError:
        return OmegaConf.to_yaml(cfg)


def parameters_of(call: Any) -> Sequence[str]:
    """Names of what a LazyCall's target takes."""
    target = call._target_
    return list(inspect.signature(locate(target) if isinstance(target, str) else target).parameters)


def check_num_classes(cfg: Any, dataset_names: Sequence[str]) -> None:
    """
    Raises:
        UserError: the data sets have other numbers of classes than the config, or than each other.
    """
    configured, classes = cfg.model.criterion.num_classes, classes_of(dataset_names)
    if classes and len(classes) != configured:
        raise UserError(
            f"model.criterion.num_classes is {configured}, but the data set {dataset_names[0]!r} "
            f"has {len(classes)} classes: set it to {len(classes)}, and "
            f"model.transformer.num_logits, now {cfg.model.transformer.num_logits}, to as many, "
            "with softmax one more."
        )


def check_overrides(cfg: Any, overrides: Sequence[str]) -> None:
    """
    Raises:
        UserError: a key that the config does not have, which detectron2 would add in silence.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("+") and OmegaConf.select(cfg, key, default=_MISSING) is _MISSING:
            raise UserError(
                f"The config has no key {key!r}: correct it, or write +{override} to add it."
            )


def train(cfg: Any, model: nn.Module, resume: bool) -> dict | None:
    """Trains `model`, from `train.init_checkpoint` or where the last training stopped.

    Raises:
        UserError: a frozen detector without its weights, or what stops any training.
    """
    for part in (cfg.dataloader.test, cfg.dataloader.evaluator):
        instantiate(part)  # what cannot be evaluated is said now, not hours later
    config = as_text(cfg)  # before the model itself becomes a part of it
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = StepTrainer(
        model,
        partial(build_loader, cfg),
        optimizer,
        precision=Precision(cfg.train.device, cfg.train.amp.enabled, cfg.train.amp.dtype),
        accumulation_steps=cfg.dataloader.train.get("accumulation_steps", 1),
        max_gradient_norm=cfg.train.max_gradient_norm,
        seed=cfg.train.seed,
    )
    checkpointer = build_checkpointer(
        cfg,
        model,
        names_of(cfg.dataloader.train),
        config,
        trainer=weakref.proxy(trainer),
        optimizer=optimizer,
    )
    results: dict = {}

    def test() -> dict:
        results.update(evaluate(cfg, trainer.model) or {})
        return results

    main_process = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main_process else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main_process else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            BestCheckpointer(checkpointer, cfg.train.best_metric)
            if cfg.train.eval_period and cfg.train.get("best_metric")
            else None,
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main_process else None,
        ]
    )
    warn_about_output(checkpointer, resume)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    is_resumed = resume and checkpointer.has_checkpoint()
    if getattr(model, "frozen_detector", False) and not is_resumed:
        path = cfg.train.init_checkpoint
        if not path:
            raise UserError("model.frozen_detector needs its weights: name train.init_checkpoint.")
        refuse_untrained_detector(checkpointer.report, path, "train.init_checkpoint")
    start_iter = trainer.iter + 1 if is_resumed else 0
    trainer.train(start_iter, cfg.train.max_iter)
    return results or None


def evaluate(cfg: Any, model: nn.Module) -> dict:
    """Metrics of `model` on `dataloader.test`."""
    loader = instantiate(cfg.dataloader.test)
    share_statistics(model)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def build_loader(cfg: Any, seed: int) -> Any:
    cfg.dataloader.train.seed = seed
    return instantiate(cfg.dataloader.train)


def build_checkpointer(
    cfg: Any, model: nn.Module, dataset_names: Sequence[str], config: str, **checkpointables: Any
) -> DetrCheckpointer:
    """Checkpointer that knows, and saves along with the weights, the data sets' class names and
    the config."""
    return DetrCheckpointer(
        model,
        cfg.train.output_dir,
        class_names=classes_of(dataset_names),
        config=config,
        **checkpointables,
    )
