"""The meta-architecture: images in, losses or detections out.

Shapes: B images, H and W of an image in pixels, Q queries, K logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..box_ops import cxcywh_to_xyxy, xyxy_to_cxcywh
from ..structures import LayerOutput, Memory, Target
from .build import build_parts
from .frozen_norm import fold_frozen_norms
from .neck import padding_mask


@META_ARCH_REGISTRY.register()
class Detr(nn.Module):
    """DETR (Carion et al., 2020): backbone, neck, transformer, set criterion.

    A variant is another choice of parts, see `detr_d2.modeling.build`; this class stays.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: nn.Module,
        transformer: nn.Module,
        criterion: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        detections_per_image: int = 100,
        input_format: str = "RGB",
    ):
        """
        Args:
            backbone: image (B, 3, H, W) -> maps by name.
            neck: (maps, padding) -> Memory.
            transformer: (Memory, targets or None) -> Predictions.
            criterion: (predictions, targets, object counts) -> weighted losses; its
                `classification` also selects detections.
            pixel_mean, pixel_std: per channel, in the order of `input_format`.
            detections_per_image: at most so many are returned, the best first.
            input_format: channel order of the images that the model is given.
        """
        super().__init__()
        fold_frozen_norms(backbone)
        self.backbone = backbone
        self.neck = neck
        self.transformer = transformer
        self.criterion = criterion
        self.detections_per_image = detections_per_image
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **build_parts(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        object_counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: detectron2's standard input: "image" (C, H, W) in [0, 255]; in
                training "instances" with `gt_boxes` (xyxy, pixels) and `gt_classes`; for
                inference optionally "height" and "width", the size of the output.
            object_counts: see `SetCriterion.forward`; training only.

        Returns:
            In training the weighted losses by name. Otherwise, for each image,
            {"instances": Instances} with `pred_boxes` (xyxy, pixels of the output size),
            `scores` and `pred_classes`, best first.
        """
        if self.training:
            # First, so that no copy to the device has to wait for the forward pass.
            targets = self.prepare_targets(batched_inputs)
            predictions = self.transformer(self.encode_images(batched_inputs), targets)
            return self.criterion(predictions, targets, object_counts)
        predictions = self.transformer(self.encode_images(batched_inputs), last_only=True)
        return self.inference(predictions.layers[-1], batched_inputs)

    def predict(self, batched_inputs: Sequence[dict[str, Any]]) -> list[LayerOutput]:
        """Raw predictions of every decoder layer, the last one last.

        Returns:
            Per layer: logits (B, Q, K), boxes (B, Q, 4) cxcywh, normalised to the image as it
            was given, without padding.
        """
        return self.transformer(self.encode_images(batched_inputs)).layers

    def encode_images(self, batched_inputs: Sequence[dict[str, Any]]) -> Memory:
        """Tokens of the images, as the encoder is given them."""
        images = self.preprocess_image(batched_inputs)
        # Convolutions are fastest in this layout, on CPUs and in mixed precision on GPUs.
        pixels = images.tensor.contiguous(memory_format=torch.channels_last)
        features = self.backbone(pixels)
        padding = padding_mask(images.image_sizes, images.tensor.shape[-2:], self.device)
        return self.neck(features, padding)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalises the images and pads them with zeros to one size, bottom and right."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def prepare_targets(self, batched_inputs: Sequence[dict[str, Any]]) -> list[Target]:
        """Ground truth with boxes as cxcywh, normalised to the unpadded image."""
        targets = []
        for x in batched_inputs:
            height, width = x["image"].shape[-2:]
            corners = x["instances"].gt_boxes.tensor
            size = corners.new_tensor([width, height, width, height])
            boxes = xyxy_to_cxcywh(corners / size).to(self.device, non_blocking=True)
            classes = x["instances"].gt_classes.to(self.device, non_blocking=True)
            targets.append(Target(classes, boxes))
        return targets

    def inference(
        self, output: LayerOutput, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Detections of one decoder layer's output, at the size each input asks for."""
        scores, classes, queries = self.criterion.classification.select(
            output.logits.float(), self.detections_per_image
        )
        boxes = output.boxes.float().gather(1, queries[..., None].expand(-1, -1, 4))
        sizes = torch.tensor([x["image"].shape[-2:] for x in batched_inputs], dtype=boxes.dtype)
        extent = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.device, non_blocking=True)
        return self.detections(cxcywh_to_xyxy(boxes) * extent, scores, classes, batched_inputs)

    @staticmethod
    def detections(
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        batched_inputs: Sequence[dict[str, Any]],
    ) -> list[dict[str, Instances]]:
        """
        Args:
            boxes: (B, D, 4) xyxy, in pixels of the images as they were given.
            scores, classes: (B, D).
        """
        results = []
        for corners, x, *rest in zip(boxes, batched_inputs, scores, classes, strict=True):
            height, width = x["image"].shape[-2:]
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(corners.clone())  # scaled in place below
            instances.scores, instances.pred_classes = rest
            instances = detector_postprocess(
                instances, x.get("height", height), x.get("width", width)
            )
            results.append({"instances": instances})
        return results
