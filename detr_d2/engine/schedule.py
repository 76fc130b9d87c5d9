"""Epochs as an alternative to iterations."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..errors import UserError

logger = logging.getLogger(__name__)


def prefer_periods(cfg: CfgNode) -> CfgNode:
    """The config without the epochs of what it counts in iterations, too. What is not detectron2's
    default was given, in a yaml, on the command line or in code: to be asked before anything
    scales it.

    Raises:
        UserError: the length is given in both. Which one came later cannot be told.
    """
    default, given = get_cfg(), cfg.clone()
    length = default.SOLVER.MAX_ITER
    if cfg.SOLVER.EPOCHS and length != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"The length is given twice, as SOLVER.EPOCHS {cfg.SOLVER.EPOCHS} and SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}: set SOLVER.EPOCHS None and SOLVER.STEP_EPOCHS [] to count "
            f"iterations, or SOLVER.MAX_ITER {length}, detectron2's default, to count epochs."
        )
    given.defrost()
    for group, period, epochs in (
        ("SOLVER", "CHECKPOINT_PERIOD", "CHECKPOINT_EPOCHS"),
        ("TEST", "EVAL_PERIOD", "EVAL_EPOCHS"),
    ):
        if cfg[group][epochs] and cfg[group][period] != default[group][period]:
            logger.info(
                f"{group}.{period} {cfg[group][period]} comes before {group}.{epochs} "
                f"{cfg[group][epochs]}."
            )
            given[group][epochs] = None
    if cfg.is_frozen():
        given.freeze()
    return given


def resolve_epochs(cfg: CfgNode, num_images: int | None) -> CfgNode:
    """The config with epochs turned into iterations over `num_images` training images.

    `SOLVER.EPOCHS` becomes `SOLVER.MAX_ITER`, `SOLVER.STEP_EPOCHS` `SOLVER.STEPS`,
    `SOLVER.CHECKPOINT_EPOCHS` `SOLVER.CHECKPOINT_PERIOD` and `TEST.EVAL_EPOCHS` `TEST.EVAL_PERIOD`;
    the epoch keys go back to their defaults, so the result says each thing once.

    Raises:
        UserError: drops of the learning rate without a length in epochs, or after it; what is no
            number of epochs; or epochs of an unknown number of images (None).
    """
    solver = cfg.SOLVER
    check_numbers("SOLVER.EPOCHS", [solver.EPOCHS])
    check_numbers("SOLVER.STEP_EPOCHS", solver.STEP_EPOCHS)
    check_numbers("SOLVER.CHECKPOINT_EPOCHS", [solver.CHECKPOINT_EPOCHS or None])  # 0: not set
    check_numbers("TEST.EVAL_EPOCHS", [cfg.TEST.EVAL_EPOCHS or None])
    if solver.STEP_EPOCHS and not solver.EPOCHS:
        raise UserError("SOLVER.STEP_EPOCHS needs SOLVER.EPOCHS, which is not set.")
    if solver.EPOCHS and any(epoch >= solver.EPOCHS for epoch in solver.STEP_EPOCHS):
        raise UserError(
            f"SOLVER.STEP_EPOCHS {list(solver.STEP_EPOCHS)} must come before the training ends "
            f"(SOLVER.EPOCHS {solver.EPOCHS})."
        )
    if not (solver.EPOCHS or solver.CHECKPOINT_EPOCHS or cfg.TEST.EVAL_EPOCHS):
        return cfg
    if num_images is None and (solver.EPOCHS or cfg.TEST.EVAL_EPOCHS):
        raise UserError(
            "SOLVER.EPOCHS and TEST.EVAL_EPOCHS need the number of images, which this training's "
            "loader does not tell: set both to None, and SOLVER.MAX_ITER and TEST.EVAL_PERIOD."
        )
    per_epoch = (num_images or 0) / solver.IMS_PER_BATCH

    def iterations(epochs: float) -> int:
        return max(1, round(epochs * per_epoch))

    resolved = cfg.clone()
    resolved.defrost()
    if solver.EPOCHS:
        resolved.SOLVER.MAX_ITER = iterations(solver.EPOCHS)
        resolved.SOLVER.STEPS = tuple(iterations(e) for e in solver.STEP_EPOCHS)
    if solver.CHECKPOINT_EPOCHS and num_images is not None:
        resolved.SOLVER.CHECKPOINT_PERIOD = iterations(solver.CHECKPOINT_EPOCHS)
    if cfg.TEST.EVAL_EPOCHS:
        resolved.TEST.EVAL_PERIOD = iterations(cfg.TEST.EVAL_EPOCHS)
    resolved.SOLVER.EPOCHS = resolved.SOLVER.CHECKPOINT_EPOCHS = resolved.TEST.EVAL_EPOCHS = None
    resolved.SOLVER.STEP_EPOCHS = []
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def check_numbers(key: str, values: Sequence[Any]) -> None:
    """
    Raises:
        UserError: one of a key's values is neither None nor a number of epochs.
    """
    for value in values:
        if value is None or (isinstance(value, (int, float)) and 0 < value < math.inf):
            continue
        raise UserError(f"{key} is {value!r}; it must be a number of epochs, more than 0, or None.")
