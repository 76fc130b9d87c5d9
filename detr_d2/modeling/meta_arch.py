"""The meta-architecture: images in, losses or detections out.

Shapes: B images, C channels of an image, H and W in pixels, Q queries, K logits, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..box_ops import xyxy_to_cxcywh
from ..errors import UserError
from ..processor import autocast
from ..structures import LayerOutput, Memory, Predictions, Target
from .from_config import build_parts
from .frozen_norm import fold_frozen_norms
from .heads import PredictionHead, select_detections
from .mask_head import MaskSource
from .neck import padding_mask
from .panoptic import PanopticMerger
from .segmentation import add_masks, add_panoptic, to_bitmasks
from .weight_gradient import weight_gradients_by_products


@META_ARCH_REGISTRY.register()
class Detr(nn.Module):
    """DETR (Carion et al., 2020): backbone, neck, transformer, set criterion.

    A variant is another choice of parts, see `detr_d2.modeling.build`; this class stays.
    """

    # Of everything but heads and coordinates, set by `optimize_for_inference` alone.
    inference_dtype: torch.dtype | None = None

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
        mask_head: nn.Module | None = None,
        mask_threshold: float = 0.5,
        panoptic: PanopticMerger | None = None,
        frozen_detector: bool = False,
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
            mask_head: (MaskSource, images, queries) -> mask logits, see mask_head.py.
            mask_threshold: a pixel of greater probability belongs to the mask.
            panoptic: (mask logits, scores, classes, size) -> `panoptic_seg`.
            frozen_detector: train the mask head alone.

        Raises:
            UserError: the transformer predicts other classes than the criterion compares, or a
                panoptic merger or a frozen detector comes without a mask head.
        """
        super().__init__()
        check_num_logits(transformer, criterion.classification)
        if panoptic is not None and mask_head is None:
            raise UserError("Detr has a panoptic merger, but no mask_head whose masks it merges.")
        if frozen_detector and mask_head is None:
            raise UserError("Detr has frozen_detector=True, but no mask_head to train.")
        fold_frozen_norms(backbone, len(pixel_mean))
        self.backbone = backbone
        self.neck = neck
        self.transformer = transformer
        self.criterion = criterion
        self.detections_per_image = detections_per_image
        self.input_format = input_format
        self.mask_head = mask_head
        self.mask_threshold = mask_threshold
        self.panoptic = panoptic
        self.frozen_detector = frozen_detector
        if frozen_detector:
            for part in (backbone, neck, transformer):
                part.requires_grad_(False)
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
            "mask_threshold": cfg.MODEL.MASK_THRESHOLD,
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
                training "instances" with `gt_boxes` (xyxy, pixels), `gt_classes` and, with a mask
                head, `gt_masks`; for inference optionally "height" and "width", the size of the
                output.
            object_counts: see `SetCriterion.forward`; training only.

        Returns:
            In training the weighted losses by name. Otherwise, for each image,
            {"instances": Instances} with `pred_boxes` (xyxy, pixels of the output size),
            `scores` and `pred_classes`, best first; with a mask head `pred_masks` (D, H, W) bool of
            the output size; with `panoptic` also "panoptic_seg".

        Raises:
            UserError: a class that the model does not have, in training.
            FloatingPointError: boxes or logits of the model are not finite, in training.
        """
        if self.training:
            # First, so that no copy to the device has to wait for the forward pass.
            targets = self.prepare_targets(batched_inputs)
            if self.frozen_detector:  # only the last layer is needed, and no denoising
                predictions = self.predict_all(batched_inputs, last_only=True)
                predictions.proposals = None
            else:
                predictions = self.predict_all(batched_inputs, targets)
            losses = self.criterion(predictions, targets, object_counts)
            if self.frozen_detector:
                return {name: losses[name] for name in ("loss_mask", "loss_dice")}
            return losses
        predictions = self.predict_all(batched_inputs, last_only=True)
        padded_size = predictions.padded_size
        results = self.inference(predictions.layers[-1], batched_inputs)
        if predictions.masks is not None:
            add_masks(results, predictions.masks, batched_inputs, padded_size, self.mask_threshold)
        if self.panoptic is not None:
            logits = predictions.layers[-1].logits.float()
            best = self.criterion.classification.best(logits)
            masks = predictions.masks
            add_panoptic(results, *best, masks, self.panoptic, batched_inputs, padded_size)
        return results

    def train(self, mode: bool = True) -> Detr:
        super().train(mode)
        if self.frozen_detector:  # without dropout, so that it stays what it was
            for part in (self.backbone, self.neck, self.transformer):
                part.eval()
        return self

    def predict(self, batched_inputs: Sequence[dict[str, Any]]) -> list[LayerOutput]:
        """Raw predictions of every decoder layer, the last one last.

        Returns:
            Per layer: logits (B, Q, K), boxes (B, Q, 4) cxcywh, normalised to the image as it
            was given, without padding.
        """
        return self.predict_all(batched_inputs).layers

    def predict_all(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        targets: Sequence[Target] | None = None,
        last_only: bool = False,
    ) -> Predictions:
        """Everything the transformer says.

        Args:
            targets: for denoising queries, in training.
            last_only: nothing but the last layer's predictions is needed.
        """
        dtype, device = self.inference_dtype, self.device.type
        with nullcontext() if dtype is None else autocast(device, dtype):
            return self._predict_all(batched_inputs, targets, last_only)

    def _predict_all(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        targets: Sequence[Target] | None,
        last_only: bool,
    ) -> Predictions:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_detector):
            memory, features, pixels = self._encode(batched_inputs)
            predictions = self.transformer(memory, targets, last_only=last_only)
        predictions.padded_size = tuple(pixels.shape[-2:])
        if self.mask_head is not None:
            device = pixels.device.type
            is_mixed = torch.is_autocast_enabled(device)
            source = MaskSource(
                predictions.memory,
                memory.tokens,
                features,
                pixels,
                predictions.content,
                predictions.layers[-1].boxes,
                torch.get_autocast_dtype(device) if is_mixed else None,
            )
            predictions.masks = partial(self.mask_head, source)
        return predictions

    def encode_images(self, batched_inputs: Sequence[dict[str, Any]]) -> Memory:
        """Tokens of the images, as the encoder is given them."""
        return self._encode(batched_inputs)[0]

    def _encode(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> tuple[Memory, dict[str, Tensor], Tensor]:
        """The memory, and what it was made from: backbone maps by name, padded pixels."""
        images = self.preprocess_image(batched_inputs)
        # Convolutions are fastest in this layout, on CPUs and in mixed precision on GPUs.
        pixels = images.tensor.contiguous(memory_format=torch.channels_last)
        # Tensors where the model is traced.
        sizes = torch.tensor([[int(side) for side in size] for size in images.image_sizes])
        padding = padding_mask(sizes.to(self.device, non_blocking=True), pixels.shape[-2:])
        with weight_gradients_by_products(pixels):
            features = self.backbone(pixels)
            return self.neck(features, padding), features, pixels

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
        """Ground truth with boxes as cxcywh, normalised to the unpadded image.

        Raises:
            UserError: a class that the model does not have; looked for where that makes nobody
                wait, in labels on the CPU.
        """
        targets = []
        for x in batched_inputs:
            height, width = x["image"].shape[-2:]
            corners = x["instances"].gt_boxes.tensor
            size = corners.new_tensor([width, height, width, height])
            boxes = xyxy_to_cxcywh(corners / size).to(self.device, non_blocking=True)
            classes = x["instances"].gt_classes
            check_classes(classes, self.criterion.classification.num_classes, x)
            classes = classes.to(self.device, non_blocking=True)
            masks = None
            if self.mask_head is not None:
                masks = to_bitmasks(x["instances"], height, width)
                masks = masks.to(self.device, non_blocking=True)
            targets.append(Target(classes, boxes, masks))
        return targets

    def inference(
        self, output: LayerOutput, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Detections of one decoder layer's output, at the size each input asks for."""
        sizes = torch.tensor([x["image"].shape[-2:] for x in batched_inputs], dtype=torch.float32)
        corners, scores, classes, queries = select_detections(
            self.criterion.classification,
            LayerOutput(output.logits.float(), output.boxes.float()),
            sizes.to(output.boxes.device, non_blocking=True),
            self.detections_per_image,
        )
        queries = None if self.mask_head is None else queries
        return self.detections(corners, scores, classes, batched_inputs, queries)

    @staticmethod
    def detections(
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        batched_inputs: Sequence[dict[str, Any]],
        queries: Tensor | None = None,
    ) -> list[dict[str, Instances]]:
        """
        Args:
            boxes: (B, D, 4) xyxy, in pixels of the images as they were given.
            scores, classes: (B, D).
            queries: (B, D), kept as `pred_queries` where they are asked for.
        """
        results = []
        for index, x in enumerate(batched_inputs):
            height, width = x["image"].shape[-2:]
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(boxes[index].clone())  # scaled in place below
            instances.scores, instances.pred_classes = scores[index], classes[index]
            if queries is not None:
                instances.pred_queries = queries[index]
            instances = detector_postprocess(
                instances, x.get("height", height), x.get("width", width)
            )
            results.append({"instances": instances})
        return results


def check_classes(classes: Tensor, num_classes: int, x: dict[str, Any]) -> None:
    """
    Raises:
        UserError: a class outside 0..num_classes-1. One of num_classes would be taken for "no
            object" in silence.
    """
    if classes.device.type != "cpu" or not len(classes):
        return
    lowest, highest = classes.min().item(), classes.max().item()
    if lowest < 0 or highest >= num_classes:
        raise UserError(
            f"{x.get('file_name', 'An image')} has an object of class "
            f"{lowest if lowest < 0 else highest}, but the model's {num_classes} classes count "
            f"from 0 to {num_classes - 1}: correct category_id, or set MODEL.DETR.NUM_CLASSES."
        )


def check_num_logits(transformer: nn.Module, classification: nn.Module) -> None:
    """
    Raises:
        UserError: a head has more or fewer logits than the classification. Most losses would not
            notice, and the model predict classes that do not exist.
    """
    for module in transformer.modules():
        if not isinstance(module, PredictionHead):
            continue
        if module.class_head.out_features != classification.num_logits:
            raise UserError(
                f"The transformer has {module.class_head.out_features} logits, but the criterion's "
                f"{classification.num_classes} classes need {classification.num_logits}: give "
                f"build_transformer num_logits={classification.num_logits} "
                "(model.transformer.num_logits in a LazyConfig)."
            )
