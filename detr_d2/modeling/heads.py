"""Prediction heads: what a decoder layer's output says about class and box.

Shapes: B images, Q queries, C channels, K classes, T objects, D detections.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..box_ops import cxcywh_to_xyxy, inverse_sigmoid
from ..losses import focal_loss
from ..processor import in_float32
from ..structures import LayerOutput


class SoftmaxClassification(nn.Module):
    """Softmax over K classes and "no object", which has the last index, K (DETR, section 3.1).

    Everything that follows from this choice stands here: the number of logits, the term in the
    matching cost, the loss and the selection of detections. A module without parameters.
    """

    smallest_normalizer = 1e-6
    # Whether the loss looks at the IoU of matched pairs.
    uses_iou = False
    # Of every class at the start; None: where the initial values of a linear layer put it.
    prior_probability = None

    def __init__(self, num_classes: int, no_object_weight: float):
        super().__init__()
        self.num_classes = num_classes
        self.no_object_weight = no_object_weight

    @property
    def num_logits(self) -> int:
        return self.num_classes + 1

    def matching_cost(self, logits: Tensor, classes: Tensor) -> Tensor:
        """(B, Q, K+1) logits and (B, T) classes -> (B, Q, T): minus the class's probability."""
        probabilities = logits.softmax(-1)
        return -probabilities.gather(2, classes[:, None].expand(-1, logits.shape[1], -1))

    def loss(
        self,
        logits: Tensor,
        classes: Tensor,
        normalizer: Tensor,
        valid: Tensor | None = None,
        iou: Tensor | None = None,
    ) -> Tensor:
        """Weighted cross-entropy.

        Args:
            logits: (B, Q, K+1).
            classes: (B, Q), `self.num_classes` where no object was matched.
            normalizer: what the weighted sum is divided by, see `normalizer`.
            valid: (B, Q) bool, False for queries that do not count.
            iou: (B, Q) of box and matched object, for losses that look at it; not used here.
        """
        weights = torch.where(classes == self.num_classes, self.no_object_weight, 1.0)
        if valid is not None:
            weights = weights * valid
        losses = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
        return (losses * weights).sum() / normalizer

    def normalizer(self, num_queries: int, object_counts: list[int]) -> float:
        """Sum of the weights of all queries, so that the loss is a weighted mean.

        Args:
            num_queries: of one image.
            object_counts: number of objects of each image.
        """
        matched = sum(min(count, num_queries) for count in object_counts)
        unmatched = num_queries * len(object_counts) - matched
        return matched + self.no_object_weight * unmatched

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(..., K+1) logits -> probability and class of the best class, (...) each."""
        return logits.softmax(-1)[..., :-1].max(-1)

    def background(self, logits: Tensor) -> Tensor:
        """(..., K+1) logits -> (...) bool, True where the prediction is "no object"."""
        return logits.argmax(-1) == self.num_classes

    def select(self, logits: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Detections of each image: every query gives its best class.

        Args:
            logits: (B, Q, K+1).
            limit: at most so many.

        Returns:
            scores (B, D), classes (B, D), queries (B, D): index of the query behind each
            detection, best first.
        """
        scores, classes = self.best(logits)
        scores, queries = scores.topk(min(limit, scores.shape[1]), dim=1)
        return scores, classes.gather(1, queries), queries


class SigmoidClassification(nn.Module):
    """An independent yes or no for every class, with focal loss (Lin et al., 2017; in DETRs since
    Deformable DETR). What `SoftmaxClassification` is for softmax; there is no "no object" logit.
    """

    smallest_normalizer = 1.0
    uses_iou = False
    prior_probability = 0.01  # Lin et al., section 4.1

    def __init__(self, num_classes: int, alpha: float = 0.25, gamma: float = 2.0):
        """
        Args:
            alpha: weight of positives; negatives have 1 - alpha.
            gamma: the larger, the less easy examples count.
        """
        super().__init__()
        self.num_classes = num_classes
        self.alpha = alpha
        self.gamma = gamma

    @property
    def num_logits(self) -> int:
        return self.num_classes

    def matching_cost(self, logits: Tensor, classes: Tensor) -> Tensor:
        """(B, Q, K) logits and (B, T) classes -> (B, Q, T): by how much the focal loss changes when
        the class goes from no to yes."""
        logits = logits.gather(2, classes[:, None].expand(-1, logits.shape[1], -1))
        probability = logits.sigmoid()
        positive = self.alpha * (1 - probability) ** self.gamma * -(probability + 1e-8).log()
        negative = (1 - self.alpha) * probability**self.gamma * -(1 - probability + 1e-8).log()
        return positive - negative

    def loss(
        self,
        logits: Tensor,
        classes: Tensor,
        normalizer: Tensor,
        valid: Tensor | None = None,
        iou: Tensor | None = None,
    ) -> Tensor:
        """Focal loss, summed over queries and classes.

        Args:
            logits: (B, Q, K).
            classes: (B, Q), `self.num_classes` where no object was matched.
            normalizer: what the sum is divided by, see `normalizer`.
            valid: (B, Q) bool, False for queries that do not count.
            iou: (B, Q) of box and matched object; not used here.
        """
        is_object = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        losses = self._losses(logits, is_object, iou)
        if valid is not None:
            losses = losses * valid[..., None]
        return losses.sum() / normalizer

    def _losses(self, logits: Tensor, is_object: Tensor, iou: Tensor | None) -> Tensor:
        """(B, Q, K) logits and 0 or 1 for each of them -> (B, Q, K)."""
        return focal_loss(logits, is_object, self.alpha, self.gamma)

    def normalizer(self, num_queries: int, object_counts: list[int]) -> float:
        """Number of objects, at least 1 (the criterion sees to that)."""
        return float(sum(object_counts))

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(..., K) logits -> probability and class of the best class, (...) each."""
        return logits.sigmoid().max(-1)

    def background(self, logits: Tensor) -> Tensor:
        """(..., K) logits -> (...) bool, True where no class has a probability of one half."""
        return logits.max(-1).values < 0

    def select(self, logits: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Detections of each image: the best pairs of query and class (Deformable DETR).

        Args:
            logits: (B, Q, K).
            limit: at most so many; a query may give several.

        Returns:
            scores (B, D), classes (B, D), queries (B, D), best first.
        """
        probabilities = logits.sigmoid().flatten(1)
        scores, pairs = probabilities.topk(min(limit, probabilities.shape[1]), dim=1)
        return scores, pairs % self.num_classes, pairs // self.num_classes


class VarifocalClassification(SigmoidClassification):
    """Sigmoids that are to predict how good the box is, so that the best boxes come first
    (Zhang et al., VarifocalNet, 2021, equation 2; in DETRs since RT-DETR).

    Positives are weighted by their IoU, negatives by 1 - alpha times the probability to the power
    gamma. The matching cost is focal, as in `SigmoidClassification`.
    """

    uses_iou = True

    def _losses(self, logits: Tensor, is_object: Tensor, iou: Tensor | None) -> Tensor:
        target = is_object * iou[..., None]
        negative = (1 - self.alpha) * logits.detach().sigmoid() ** self.gamma
        weight = torch.where(is_object > 0, target, negative)
        return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_layers: int,
        xavier: bool = False,
    ):
        """
        Args:
            xavier: initialise the weights as all in the official transformers are; prediction
                heads, which stand outside of them, are not.
        """
        super().__init__()
        widths = [in_features] + [hidden_features] * (num_layers - 1) + [out_features]
        self.layers = nn.ModuleList(
            nn.Linear(width, next_width)
            for width, next_width in zip(widths[:-1], widths[1:], strict=True)
        )
        for layer in self.layers if xavier else ():
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class PredictionHead(nn.Module):
    """Class and box of each query (DETR, section 3.2, "prediction FFNs").

    The box is absolute, or an offset from the reference (Deformable DETR, appendix A.3): from a
    point, centre and nothing else; from a box, all four numbers, in logits.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_logits: int,
        is_offset: bool = False,
        reference_eps: float = 1e-5,
        prior_probability: float | None = None,
        initial_size_logit: float = 0.0,
    ):
        """
        Args:
            is_offset: whether boxes are relative to the reference.
            reference_eps: see `inverse_sigmoid`.
            prior_probability: what every class starts at (Lin et al., 2017, section 4.1), for
                sigmoids; None: where the initial values of a linear layer put it.
            initial_size_logit: of width and height, for boxes at reference points.
        """
        super().__init__()
        self.is_offset = is_offset
        self.reference_eps = reference_eps
        self.class_head = nn.Linear(hidden_dim, num_logits)
        self.box_head = MLP(hidden_dim, hidden_dim, 4, num_layers=3)
        if prior_probability is not None:
            prior_logit = -math.log(1 / prior_probability - 1)
            nn.init.constant_(self.class_head.bias, prior_logit)
        if is_offset:
            nn.init.zeros_(self.box_head.layers[-1].weight)
            nn.init.zeros_(self.box_head.layers[-1].bias)
            nn.init.constant_(self.box_head.layers[-1].bias[2:], initial_size_logit)

    def forward(self, content: Tensor, reference: Tensor | None = None) -> LayerOutput:
        """(B, Q, C), (B, Q, 2 or 4) in [0, 1] -> logits (B, Q, num_logits), boxes (B, Q, 4)
        cxcywh in [0, 1]."""
        return LayerOutput(self.class_head(content), self.boxes(content, reference))

    def boxes(self, content: Tensor, reference: Tensor | None = None) -> Tensor:
        """The boxes alone."""
        # In float32 whatever autocast says: bfloat16 above 0.5 is as coarse as 1/256 of the image.
        logits = in_float32(self.box_head, content)
        if self.is_offset:
            start = inverse_sigmoid(reference, self.reference_eps)
            logits = logits + F.pad(start, (0, 4 - start.shape[-1]))
        return logits.sigmoid()


def select_detections(
    classification: SoftmaxClassification | SigmoidClassification,
    output: LayerOutput,
    sizes: Tensor,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best detections of one decoder layer, in pixels.

    Args:
        output: logits (B, Q, number of logits) and boxes (B, Q, 4), cxcywh, normalised.
        sizes: (B, 2), height and width of the images without padding, in pixels.
        limit: at most so many of an image.

    Returns:
        boxes (B, D, 4) xyxy in pixels, scores (B, D), classes (B, D) and queries (B, D), the best
        first.
    """
    scores, classes, queries = classification.select(output.logits, limit)
    boxes = output.boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    extent = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    return cxcywh_to_xyxy(boxes) * extent, scores, classes, queries
