"""Prediction heads: what a decoder layer's output says about class and box.

Shapes: B images, Q queries, C channels, K classes, T objects, D detections.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import LayerOutput


class SoftmaxClassification(nn.Module):
    """Softmax over K classes and "no object", which has the last index, K (DETR, section 3.1).

    Everything that follows from this choice stands here: the number of logits, the term in the
    matching cost, the loss and the selection of detections. A module without parameters.
    """

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

    def loss(self, logits: Tensor, classes: Tensor, normalizer: Tensor) -> Tensor:
        """Weighted cross-entropy.

        Args:
            logits: (B, Q, K+1).
            classes: (B, Q), `self.num_classes` where no object was matched.
            normalizer: what the weighted sum is divided by, see `normalizer`.
        """
        weights = torch.where(classes == self.num_classes, self.no_object_weight, 1.0)
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

    def background(self, logits: Tensor) -> Tensor:
        """(..., K+1) logits -> (...) bool, True where the prediction is "no object"."""
        return logits.argmax(-1) == self.num_classes

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detections of one image: each query gives its best class.

        Args:
            logits: (Q, K+1).

        Returns:
            scores (D,), classes (D,), queries (D,): index of the query behind each detection.
        """
        scores, classes = logits.softmax(-1)[:, :-1].max(-1)
        return scores, classes, torch.arange(len(scores), device=scores.device)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, num_layers: int):
        super().__init__()
        widths = [in_features] + [hidden_features] * (num_layers - 1) + [out_features]
        self.layers = nn.ModuleList(
            nn.Linear(width, next_width)
            for width, next_width in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class PredictionHead(nn.Module):
    """Class and box of each query; the box is absolute (DETR, section 3.2, "prediction FFNs")."""

    def __init__(self, hidden_dim: int, num_logits: int):
        super().__init__()
        self.class_head = nn.Linear(hidden_dim, num_logits)
        self.box_head = MLP(hidden_dim, hidden_dim, 4, num_layers=3)

    def forward(self, content: Tensor, reference: Tensor | None = None) -> LayerOutput:
        """(B, Q, C) -> logits (B, Q, num_logits), boxes (B, Q, 4) cxcywh in [0, 1].

        `reference` is what a head that predicts offsets would add to; this one ignores it.
        """
        # In float32 whatever autocast says: bfloat16 above 0.5 is as coarse as 1/256 of the image.
        boxes = self.box_head(content).float().sigmoid()
        return LayerOutput(self.class_head(content), boxes)
