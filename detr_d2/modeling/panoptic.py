"""From masks to one class and one segment for every pixel (DETR, section 4.4).

Shapes: Q queries, S of them that may become segments, H and W of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from torch import Tensor

from ..errors import UserError


class PanopticMerger:
    """Every pixel goes to the query with the largest mask logit there. Of queries of the same stuff
    class the first stays; tiny segments, and those other queries, give their pixels to whoever is
    next, as in the original."""

    def __init__(
        self,
        thing_classes: Collection[int],
        score_threshold: float = 0.85,
        min_area: int = 4,
    ):
        """
        Args:
            thing_classes: contiguous ids of classes whose objects are counted; all others are
                stuff.
            score_threshold: queries with a lower score are left out. With softmax no less than 0.5:
                below, queries whose likeliest answer is "no object" may become segments, which the
                original leaves out.
            min_area: in pixels; a segment as small as this is left out.
        """
        self.thing_classes = set(thing_classes)
        self.score_threshold = score_threshold
        self.min_area = min_area

    @classmethod
    def from_datasets(cls, names: Sequence[str], **arguments: Any) -> PanopticMerger:
        """
        Args:
            names: of data sets; the first panoptic one says which classes are things.
            arguments: see `PanopticMerger`.

        Raises:
            UserError: none of them is panoptic.
        """
        for name in names:
            things = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
            if things and MetadataCatalog.get(name).get("stuff_classes"):
                return cls(things.values(), **arguments)
        raise UserError(
            f"None of the data sets ({', '.join(names)}) is panoptic, with metadata that say which "
            "classes are things and which are stuff: name one that is, or set "
            "MODEL.DETR.PANOPTIC.ENABLED False (model.panoptic=null)."
        )

    def candidates(self, scores: Tensor) -> Tensor:
        """(Q,) -> (S,) int64, the queries whose masks are wanted."""
        return (scores > self.score_threshold).nonzero()[:, 0]

    def __call__(
        self, logits: Tensor, scores: Tensor, classes: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """
        Args:
            logits: (S, H', W') masks of the `candidates`, at the size that the model saw.
            scores, classes: (S,).
            size: H, W of the result.

        Returns:
            detectron2's `panoptic_seg`: (H, W) int32 with the id of each pixel's segment, from 1 on
            (0 where there is none), and for each id a dictionary of "id", "isthing",
            "category_id", "score" and "area".
        """
        # The original decides at the size that the model saw, and resizes the decision, between
        # centres of pixels, as Pillow does; "nearest" would do so between their corners.
        while len(logits):
            winners = self._merge_stuff(logits.argmax(0), classes)
            winners = F.interpolate(
                winners[None, None].float(), size=tuple(size), mode="nearest-exact"
            )[0, 0].long()
            areas = torch.bincount(winners.flatten(), minlength=len(logits))
            tiny = areas <= self.min_area
            if not tiny.any():
                return self._segments(winners, areas, scores, classes)
            logits, scores, classes = logits[~tiny], scores[~tiny], classes[~tiny]
        return torch.zeros(*size, dtype=torch.int32, device=logits.device), []

    def _merge_stuff(self, winners: Tensor, classes: Tensor) -> Tensor:
        """(H, W) indices of queries; those of one stuff class become the first of them."""
        first: dict[int, int] = {}
        target = list(range(len(classes)))
        for index, class_id in enumerate(classes.tolist()):
            if class_id not in self.thing_classes:
                target[index] = first.setdefault(class_id, index)
        return torch.tensor(target, device=winners.device)[winners]

    def _segments(
        self, winners: Tensor, areas: Tensor, scores: Tensor, classes: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        info = [
            {
                "id": index + 1,
                "isthing": class_id in self.thing_classes,
                "category_id": class_id,
                "score": score,
                "area": area,
            }
            for index, (class_id, score, area) in enumerate(
                zip(classes.tolist(), scores.tolist(), areas.tolist(), strict=True)
            )
        ]
        return (winners + 1).to(torch.int32), info
