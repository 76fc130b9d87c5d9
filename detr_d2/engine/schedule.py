"""Epochs as an alternative to iterations."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..errors import UserError

logger = logging.getLogger(__name__)


# Group, key in iterations, key in epochs.
LENGTH = ("SOLVER", "MAX_ITER", "EPOCHS")
PERIODS = (
    ("SOLVER", "CHECKPOINT_PERIOD", "CHECKPOINT_EPOCHS"),
    ("TEST", "EVAL_PERIOD", "EVAL_EPOCHS"),
)


def prefer_command_line(cfg: CfgNode, overridden: Sequence[str]) -> None:
    """Iterations and epochs of the command line come before those of the file; in place.

    Args:
        overridden: the keys that the command line gives.

    Raises:
        UserError: the length is in epochs, and the drops of the learning rate in iterations.
    """
    solver, default = cfg.SOLVER, get_cfg()
    in_epochs = bool(solver.EPOCHS)
    for group, period, epochs in (LENGTH, *PERIODS):
        gives_epochs = f"{group}.{epochs}" in overridden and bool(cfg[group][epochs])
        gives_period = f"{group}.{period}" in overridden
        if gives_period and not gives_epochs:
            cfg[group][epochs] = None
        elif gives_epochs and not gives_period:
            cfg[group][period] = default[group][period]
    if "SOLVER.STEPS" in overridden and solver.EPOCHS:
        raise UserError(
            f"SOLVER.STEPS counts iterations, but SOLVER.EPOCHS is {solver.EPOCHS}: give "
            "SOLVER.STEP_EPOCHS, or SOLVER.MAX_ITER as well."
        )
    lost = ""
    if not solver.EPOCHS and "SOLVER.STEP_EPOCHS" not in overridden:
        if "SOLVER.STEPS" not in overridden and (in_epochs or solver.STEP_EPOCHS):
            solver.STEPS = ()  # detectron2's default is of its own schedule
            lost = f"SOLVER.STEP_EPOCHS {list(solver.STEP_EPOCHS)}" if solver.STEP_EPOCHS else ""
        solver.STEP_EPOCHS = []
    elif "SOLVER.EPOCHS" in overridden and not solver.STEP_EPOCHS:
        steps = tuple(solver.STEPS)
        lost = f"SOLVER.STEPS {steps}" if steps not in ((), tuple(default.SOLVER.STEPS)) else ""
    if lost:
        logger.warning(
            f"{lost} of the file is not used, for the length is now in other units: the learning "
            "rate does not drop unless SOLVER.STEPS or SOLVER.STEP_EPOCHS says when."
        )


def prefer_periods(cfg: CfgNode) -> CfgNode:
    """The config without the epochs of what it counts in iterations, too. What is not detectron2's
    default was given, in a yaml, on the command line or in code: to be asked before anything
    scales it.

    Raises:
        UserError: the length is given in both. Which one came later cannot be told.
    """
    default, given = get_cfg(), cfg.clone()
    if cfg.SOLVER.EPOCHS and default.SOLVER.MAX_ITER != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"The length is given twice, SOLVER.EPOCHS {cfg.SOLVER.EPOCHS} and SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}: to count iterations, set SOLVER.EPOCHS None and "
            "SOLVER.STEP_EPOCHS []; to count epochs, take SOLVER.MAX_ITER out of the config, or "
            "give SOLVER.EPOCHS on the command line."
        )
    given.defrost()
    for group, period, epochs in PERIODS:
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
            "loader does not tell: set both to None, SOLVER.STEP_EPOCHS to [], and SOLVER.MAX_ITER "
            "and TEST.EVAL_PERIOD."
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
