"""Optimizer from config."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from ..errors import UserError


class LearningRateFactor:
    """Parameter name -> factor of its learning rate.

    Args:
        backbone: of the backbone (DETR, appendix A.4).
        sampling: of what says where to look: reference points and sampling offsets (Deformable
            DETR, section 5).
        mask_head: of the mask head, which starts from nothing beside a trained detector.
    """

    def __init__(self, backbone: float, sampling: float = 1.0, mask_head: float = 1.0):
        self.backbone = backbone
        self.sampling = sampling
        self.mask_head = mask_head

    def __call__(self, name: str) -> float:
        parts = name.split(".")
        if "backbone" in parts:
            return self.backbone
        if "mask_head" in parts:
            return self.mask_head
        return self.sampling if {"reference_head", "sampling_offsets"} & set(parts) else 1.0


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD; some parts have a learning rate of their own, see `LearningRateFactor`.

    As in the original, weight decay covers every parameter, norms included; biases unless
    `SOLVER.WEIGHT_DECAY_BIAS` says otherwise (`SOLVER.WEIGHT_DECAY_NORM` is not read). Clipping
    by the norm of all gradients ("full_model") is the trainer's; detectron2's clipping per
    parameter ("value", "norm") is added here.

    Raises:
        UserError: nothing to train, an unknown optimizer, or clipping that does not exist.
    """
    solver = cfg.SOLVER
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=LearningRateFactor(
            solver.BACKBONE_MULTIPLIER, solver.SAMPLING_MULTIPLIER, solver.MASK_HEAD_MULTIPLIER
        ),
    )
    if not parameters:
        raise UserError("The model has no parameter to train: everything is frozen.")
    if solver.OPTIMIZER == "ADAMW":
        # One kernel for all parameters, where their device has it.
        devices = {p.device.type for group in parameters for p in group["params"]}
        fused = devices <= {"cpu"} or devices <= {"cuda"}
        optimizer = torch.optim.AdamW(parameters, lr=solver.BASE_LR, fused=fused)
    elif solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            parameters, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    else:
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be ADAMW or SGD.")
    if full_model_clip_norm(cfg) is None:
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def full_model_clip_norm(cfg: CfgNode) -> float | None:
    """Largest norm of all gradients taken as one vector, or None where the config asks for none.

    Raises:
        UserError: an unknown CLIP_TYPE, or full_model with a norm other than 2.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    if not clipping.ENABLED:
        return None
    if clipping.CLIP_TYPE not in ("full_model", "value", "norm"):
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clipping.CLIP_TYPE!r}; it must be full_model, "
            "value or norm."
        )
    if clipping.CLIP_TYPE != "full_model":
        return None
    if clipping.NORM_TYPE != 2:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.NORM_TYPE is {clipping.NORM_TYPE}: full_model clips by the "
            "2-norm, set it to 2.0, or CLIP_TYPE to norm, which clips each parameter by any."
        )
    return clipping.CLIP_VALUE
