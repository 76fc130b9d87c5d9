"""A detector as one function of tensors, which `torch.export` can trace.

Shapes: B images, H and W of the padded batch in pixels, D detections per image, h and w of masks.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.heads import select_detections
from ..modeling.mask_head import MaskSource
from ..modeling.meta_arch import Detr
from ..modeling.neck import padding_mask
from ..modeling.queries import TopKQueries
from ..structures import LayerOutput
from .fold import folded

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "classes")
# Of detectors with masks, after the others.
MASK_OUTPUTS = ("queries", "masks")


class ExportableDetr(nn.Module):
    """`Detr` from padded images to detections: normalisation, padding mask and selection included.

    What is padded counts for nothing, so an image has the same detections alone and in a batch.
    """

    def __init__(self, model: Detr):
        """
        Raises:
            UserError: a backbone that wants squares, of which there is no size that is free.
        """
        super().__init__()
        constraints = model.backbone.padding_constraints
        if constraints.get("square_size", 0) > 0:
            raise UserError(
                f"{type(model.backbone).__name__} wants images padded to "
                f"{constraints['square_size']} pixels square, and in an exported file their size "
                "is free: the model cannot be exported."
            )
        # As detectron2's `ImageList.from_tensors` reads them.
        divisor = constraints.get("size_divisibility", model.backbone.size_divisibility)
        self.size_divisibility = max(divisor, 1)
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.backbone = folded(model.backbone, model.device, len(model.pixel_mean))
        self.neck = model.neck
        self.transformer = model.transformer
        if isinstance(self.transformer.queries, TopKQueries):
            self.transformer.queries.supervise_all = False
        self.mask_head = model.mask_head
        self.classification = model.criterion.classification
        self.detections_per_image = model.detections_per_image
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        return OUTPUTS if self.mask_head is None else OUTPUTS + MASK_OUTPUTS

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: (B, 3, H, W) float32 in [0, 255], in the model's channel order (or with as many
                channels as it has); padded at the bottom and at the right with anything.
            sizes: (B, 2) int64 height and width of each image without padding.

        Returns:
            boxes (B, D, 4) xyxy in pixels of the images as given; scores (B, D), best first;
            classes (B, D) int64. With a mask head also queries (B, D) int64, the one behind each
            detection, and masks (B, D, h, w), logits that are to be enlarged to H and W, rounded up
            to multiples of `size_divisibility`.
        """
        source, logits, boxes = self._predict(images, sizes)
        best = self._select(logits, boxes, sizes, self.detections_per_image)
        *detections, queries = best
        if self.mask_head is None:
            return tuple(detections)
        rows = torch.arange(queries.shape[0], device=queries.device)[:, None].expand_as(queries)
        masks = self.mask_head(source, rows.flatten(), queries.flatten())
        return *detections, queries, masks.view(*queries.shape, *masks.shape[1:])

    def detections(self, images: Tensor, sizes: Tensor, limit: int) -> list[Tensor]:
        """Boxes, scores and classes as `forward` returns them, but of another number."""
        _, logits, boxes = self._predict(images, sizes)
        return self._select(logits, boxes, sizes, limit)[:3]

    def num_queries(self, images: Tensor) -> int:
        """Of images (B, C, H, W) without padding: small ones may have fewer."""
        sizes = torch.tensor([images.shape[2:]]).expand(len(images), 2)
        return self._predict(images, sizes)[1].shape[1]

    def _predict(self, images: Tensor, sizes: Tensor) -> tuple[MaskSource, Tensor, Tensor]:
        """What masks are made from; logits (B, Q, K) and boxes (B, Q, 4) of the last layer."""
        divisor = self.size_divisibility
        if divisor > 1:
            height, width = images.shape[2:]
            below = (height + divisor - 1) // divisor * divisor - height
            right = (width + divisor - 1) // divisor * divisor - width
            images = F.pad(images, (0, right, 0, below))
        padding = padding_mask(sizes, images.shape[2:])
        pixels = (images - self.pixel_mean) / self.pixel_std
        pixels = pixels.masked_fill(padding[:, None], 0)
        features = self.backbone(pixels)
        memory = self.neck(features, padding)
        predictions = self.transformer(memory, last_only=True)
        output = predictions.layers[-1]
        source = MaskSource(
            predictions.memory, memory.tokens, features, pixels, predictions.content, output.boxes
        )
        return source, output.logits.float(), output.boxes.float()

    def _select(self, logits: Tensor, boxes: Tensor, sizes: Tensor, limit: int) -> list[Tensor]:
        """Boxes in pixels, scores, classes and queries of the best detections."""
        output = LayerOutput(logits, boxes)
        return list(select_detections(self.classification, output, sizes, limit))
