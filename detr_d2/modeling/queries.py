"""Query initialisers: memory -> what the decoder starts from, and proposals to supervise.

`(memory) -> (Queries, Proposals | None)`. Those that know nothing of the image propose nothing.

Shapes: B images, Q queries, S memory tokens, L levels, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..box_ops import inverse_sigmoid
from ..processor import in_float32
from ..structures import LayerOutput, Memory, Proposals, Queries
from .deformable import token_centres
from .heads import MLP, PredictionHead
from .position import sine_embedding


class LearnedQueries(nn.Module):
    """One learned position vector per query; the content starts at zero (DETR, section 3.2)."""

    def __init__(self, num_queries: int, hidden_dim: int):
        super().__init__()
        self.position = nn.Embedding(num_queries, hidden_dim)

    def forward(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """See the head of this file."""
        position = _for_each_image(self.position, memory)
        return Queries(content=torch.zeros_like(position), position=position), None


class PointQueries(nn.Module):
    """Learned positions, each with a reference point that is read from it
    (Conditional DETR, section 3.3; Deformable DETR, section 4.1)."""

    def __init__(
        self, num_queries: int, hidden_dim: int, learned_content: bool, reference_layers: int
    ):
        """
        Args:
            learned_content: start from a learned content (Deformable DETR) or from zero.
            reference_layers: linear layers between position and point: 1 in Deformable DETR, 2 in
                Conditional DETR.
        """
        super().__init__()
        self.position = nn.Embedding(num_queries, hidden_dim)
        self.content = nn.Embedding(num_queries, hidden_dim) if learned_content else None
        self.reference_head = MLP(hidden_dim, hidden_dim, 2, reference_layers, xavier=True)
        if reference_layers == 1:
            nn.init.zeros_(self.reference_head.layers[0].bias)

    def forward(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """See the head of this file; references are points (B, Q, 2)."""
        position = _for_each_image(self.position, memory)
        reference = in_float32(self.reference_head, self.position.weight).sigmoid()
        queries = Queries(
            content=_content(self.content, position),
            position=position,
            reference=reference.expand(position.shape[0], -1, -1),
        )
        return queries, None


class AnchorQueries(nn.Module):
    """One learned box per query (DAB-DETR, section 4.2)."""

    def __init__(self, num_queries: int, hidden_dim: int, learned_content: bool):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.anchors = nn.Embedding(num_queries, 4)
        self.content = nn.Embedding(num_queries, hidden_dim) if learned_content else None

    def forward(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """See the head of this file; references are boxes (B, Q, 4)."""
        anchors = self.anchors.weight.expand(memory.tokens.shape[0], -1, -1)
        zeros = memory.tokens.new_zeros(*anchors.shape[:2], self.hidden_dim)
        return Queries(_content(self.content, zeros), reference=anchors.float().sigmoid()), None


class TopKQueries(nn.Module):
    """The best proposals that the encoder's tokens make, one each
    ("two-stage": Deformable DETR, section 4.2 and appendix A.4; DINO, section 3.4).

    A token proposes a box about its own cell, of 0.05 * 2^level of the image. Cells on padding, and
    those whose centre or size is not within (0.01, 0.99), all propose the same: their features are
    zeroed, so that they share one score, which training makes low, and the box (1, 1, 1, 1).
    """

    def __init__(
        self,
        num_queries: int,
        hidden_dim: int,
        head: PredictionHead,
        content: str,
        class_agnostic: bool,
        supervise_all: bool,
    ):
        """
        Args:
            num_queries: Q; an image of fewer tokens has as many queries as tokens.
            head: predicts class and box of a token, from the cell's box as reference.
            content: "learned", a vector for each rank (DINO); "memory", the token's features;
                "position", a projection of the box (Deformable DETR), which gives a position, too.
            class_agnostic: rank by the first class, which stands for any object (Deformable DETR),
                else by the best class (DINO).
            supervise_all: propose what every token says (Deformable DETR), else what the chosen
                ones say (DINO).
        """
        super().__init__()
        self.num_queries = num_queries
        self.channels = hidden_dim // 2
        self.class_agnostic = class_agnostic
        self.supervise_all = supervise_all
        self.memory_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.memory_proj.weight)
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.head = head
        self.content = nn.Embedding(num_queries, hidden_dim) if content == "learned" else None
        if self.content is not None:  # as in DINO's code, where the transformer's reset reaches it
            nn.init.xavier_uniform_(self.content.weight)
        self.takes_features = content == "memory"
        self.position_proj = self.position_norm = None
        if content == "position":
            self.position_proj = nn.Linear(2 * hidden_dim, 2 * hidden_dim)
            nn.init.xavier_uniform_(self.position_proj.weight)
            self.position_norm = nn.LayerNorm(2 * hidden_dim)

    def forward(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """See the head of this file; references are boxes (B, Q, 4)."""
        cells, unusable = self._cells(memory)
        tokens = memory.tokens.masked_fill(unusable[..., None], 0)
        tokens = self.memory_norm(self.memory_proj(tokens))
        logits = self.head.class_head(tokens)
        scores = logits[..., 0] if self.class_agnostic else logits.max(-1).values
        chosen = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices

        features = _take(tokens, chosen)
        boxes = self._boxes(features, _take(cells, chosen))
        if self.supervise_all:
            proposals = LayerOutput(logits, self._boxes(tokens, cells))
        else:
            proposals = LayerOutput(_take(logits, chosen), boxes)
        return self._queries(features.detach(), boxes.detach()), Proposals(
            proposals, self.class_agnostic
        )

    def _queries(self, features: Tensor, boxes: Tensor) -> Queries:
        if self.position_proj is not None:
            waves = sine_embedding(boxes, self.channels).to(features.dtype)
            position, content = self.position_norm(self.position_proj(waves)).chunk(2, dim=-1)
            return Queries(content, position, boxes)
        if self.takes_features:
            return Queries(features, reference=boxes)
        content = self.content.weight[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        return Queries(content.to(features.dtype), reference=boxes)

    def _boxes(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """(B, S, C), logits (B, S, 4) of the cells -> (B, S, 4)."""
        return (self.head.box_head(tokens).float() + cells).sigmoid()

    def _cells(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Logits (B, S, 4) of every cell's box, infinite where there is none; (B, S) bool of
        the cells that propose nothing."""
        centres = token_centres(memory.level_shapes, memory.valid_ratios)
        sizes = [
            centres.new_full((height * width, 2), 0.05 * 2**level)
            for level, (height, width) in enumerate(memory.level_shapes)
        ]
        boxes = torch.cat((centres, torch.cat(sizes).expand_as(centres)), dim=-1)
        inside = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
        unusable = memory.padding | ~inside
        logits = inverse_sigmoid(boxes, eps=1e-6)
        return logits.masked_fill(unusable[..., None], float("inf")), unusable


def _for_each_image(embedding: nn.Embedding, memory: Memory) -> Tensor:
    """(Q, C) weights -> (B, Q, C) in the memory's type."""
    return embedding.weight.to(memory.tokens.dtype).expand(memory.tokens.shape[0], -1, -1)


def _content(embedding: nn.Embedding | None, like: Tensor) -> Tensor:
    """(B, Q, C) learned content, or zeros."""
    if embedding is None:
        return torch.zeros_like(like)
    return embedding.weight.to(like.dtype).expand_as(like)


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """(B, S, N) values, (B, Q) indices -> (B, Q, N)."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
