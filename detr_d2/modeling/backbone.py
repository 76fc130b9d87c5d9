"""Backbones that detectron2 does not have."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    ResNet,
    build_resnet_backbone,
)
from torch import Tensor, nn

from ..errors import UserError, require_package

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet whose res5 has stride 1 and torchvision's dilation, the DC5 of DETR's paper.

    detectron2's RES5_DILATION also dilates the 3x3 convolution of res5's first block;
    torchvision, with which the published DC5 weights were trained, does not.

    Raises:
        UserError: `MODEL.RESNETS.RES5_DILATION` is not 2.
    """
    if cfg.MODEL.RESNETS.RES5_DILATION != 2:
        raise UserError(
            "build_resnet_dc5_backbone needs MODEL.RESNETS.RES5_DILATION: 2, "
            f"got {cfg.MODEL.RESNETS.RES5_DILATION}."
        )
    resnet = build_resnet_backbone(cfg, input_shape)
    first_convolution = resnet.res5[0].conv2
    first_convolution.dilation = first_convolution.padding = (1, 1)
    return resnet


@BACKBONE_REGISTRY.register()
def build_basic_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet of basic blocks with any width and depth (detectron2 fixes those of R18 and R34).

    `MODEL.BASIC_RESNET.BLOCKS_PER_STAGE` gives one number per stage from res2 on; width doubles
    from stage to stage, starting at `MODEL.RESNETS.RES2_OUT_CHANNELS`.
    """
    resnets = cfg.MODEL.RESNETS
    stages = make_basic_stages(
        resnets.STEM_OUT_CHANNELS,
        resnets.RES2_OUT_CHANNELS,
        cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE,
        resnets.NORM,
    )
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    resnet = ResNet(stem, stages, out_features=resnets.OUT_FEATURES)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


def make_basic_stages(
    in_channels: int, out_channels: int, blocks: Sequence[int], norm: str
) -> list[list[nn.Module]]:
    """Stages of basic blocks for detectron2's `ResNet`, each twice as wide and half as fine as the
    one before.

    Args:
        in_channels: of the stem.
        out_channels: of the first stage, which keeps the stem's resolution.
        blocks: number of blocks in each stage.
    """
    stages = []
    for index, num_blocks in enumerate(blocks):
        first_stride = 1 if index == 0 else 2
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    return stages


class TimmBackbone(Backbone):
    """A timm model as detectron2 backbone; its maps are named "p0", "p1", … from fine to coarse.

    Batch norms are frozen where asked for: with the small batches of detection their statistics
    are too noisy to learn from.
    """

    def __init__(
        self,
        name: str,
        out_indices: list[int],
        pretrained: bool,
        freeze_norm: bool,
        freeze_at: int = 0,
    ):
        """
        Args:
            name: timm model name.
            out_indices: which of the model's feature maps to return; [] all.
            pretrained: let timm load (and download) its weights.
            freeze_norm: replace batch norms by constant affine maps.
            freeze_at: freeze what leads to the maps of stride 2 ** freeze_at and less, as
                `MODEL.BACKBONE.FREEZE_AT` does with ResNets; 0: nothing.

        Raises:
            UserError: timm is not installed, or has no such model or maps.
        """
        super().__init__()
        timm = require_package("timm", "timm")
        arguments = {"out_indices": tuple(out_indices)} if out_indices else {}
        try:
            body = timm.create_model(name, pretrained=pretrained, features_only=True, **arguments)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"MODEL.TIMM.NAME is {name!r} and MODEL.TIMM.OUT_INDICES {list(out_indices)}: "
                f"timm says: {error}"
            ) from error
        if freeze_norm:
            body = timm.layers.freeze_batch_norm_2d(body)
        self.name = name
        self.body = body
        # Swin and its like return (B, H, W, channels).
        self._channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        info = body.feature_info
        self._out_features = [f"p{index}" for index in range(len(info.channels()))]
        self._out_feature_channels = dict(zip(self._out_features, info.channels(), strict=True))
        self._out_feature_strides = dict(zip(self._out_features, info.reduction(), strict=True))
        self._freeze(freeze_at)

    def _freeze(self, freeze_at: int) -> None:
        """Modules are in the order of the computation: frozen are all up to the one that makes the
        map."""
        maps = self.body.feature_info.info
        makers = [each["module"] for each in maps if each["reduction"] <= 2**freeze_at]
        if not freeze_at or not makers:
            return
        # Some models flatten containers: blocks.1 may be called blocks_1.
        last = makers[-1].replace(".", "_")
        is_inside = False
        for name, module in self.body.named_modules():
            below = f"{name}.".replace(".", "_").startswith(f"{last}_")
            if is_inside and not below:
                return
            is_inside = below
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps (B, channels, H / stride, W / stride) by name.

        Raises:
            UserError: the model does not take images of this size.
        """
        try:
            maps = self.body(x)
        except AssertionError as error:  # of models made for one size, or for multiples of one
            raise UserError(
                f"MODEL.TIMM.NAME {self.name!r} does not take a batch of {x.shape[3]}x{x.shape[2]} "
                f"pixels ({error}): choose a model without a fixed size, as convolutional ones are."
            ) from error
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return dict(zip(self._out_features, maps, strict=True))


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Backbone from `MODEL.TIMM`. Weights: timm's own, or any file given as MODEL.WEIGHTS."""
    timm_cfg = cfg.MODEL.TIMM
    if timm_cfg.PRETRAINED:
        warn_of_other_pixels(cfg)
    return TimmBackbone(
        timm_cfg.NAME,
        timm_cfg.OUT_INDICES,
        timm_cfg.PRETRAINED,
        timm_cfg.FREEZE_NORM,
        cfg.MODEL.BACKBONE.FREEZE_AT if timm_cfg.FREEZE_NORM else 0,
    )


def warn_of_other_pixels(cfg: CfgNode) -> None:
    """Pretrained weights see other pixels than those they learned from where channel order, mean or
    deviation differ: they still train, badly."""
    known = require_package("timm", "timm").get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    if known is None:
        return
    for key, values in (("PIXEL_MEAN", known.mean), ("PIXEL_STD", known.std)):
        wanted = [round(255 * value, 3) for value in values]
        if any(abs(a - b) > 1 for a, b in zip(wanted, cfg.MODEL[key], strict=False)):
            logger.warning(
                f"MODEL.{key} is {list(cfg.MODEL[key])}, but the weights of timm's "
                f"{cfg.MODEL.TIMM.NAME} were trained with {wanted}: set it to that."
            )
    if cfg.INPUT.FORMAT != "RGB":
        logger.warning(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, but timm's weights want RGB.")
