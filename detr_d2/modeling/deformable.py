"""Multi-scale deformable attention (Deformable DETR, Zhu et al., 2021, section 4.1).

Shapes: B images, Q queries, S memory tokens, L levels, M heads, P sampling points per head and
level, C channels, D = C / M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import Memory, QueryPosition
from .attention import check_heads, with_position
from .recompute import run as run_recomputed


class DeformableAttention(nn.Module):
    """Each query looks at a few places about its reference, on every level (equation 3)."""

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        recompute: bool = False,
    ):
        """
        Args:
            num_levels: L.
            num_points: P, of each head on each level.
            recompute: activation checkpointing of the samples, see recompute.py.

        Raises:
            UserError: `hidden_dim` is not divisible by `num_heads`.
        """
        super().__init__()
        self.recompute = recompute
        self.num_heads = check_heads(hidden_dim, num_heads)
        self.num_levels = num_levels
        self.num_points = num_points
        num_samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(hidden_dim, 2 * num_samples)
        self.attention_weights = nn.Linear(hidden_dim, num_samples)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start every head looks into a direction of its own, point p at a distance of p
        cells, and all samples count the same (appendix A.4)."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None, :] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, content: Tensor, position: QueryPosition, memory: Memory, reference: Tensor
    ) -> Tensor:
        """
        Args:
            content: (B, Q, C).
            position: its embedding is added to the content where samples are chosen.
            memory: S tokens on L levels.
            reference: (B, Q, 2 or 4) in [0, 1] of the unpadded image. Offsets from a point are in
                cells; offsets from a box are in P-ths of half its width and height.

        Returns:
            (B, Q, C)
        """
        query = with_position(content, position.embedding)
        samples = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        value = self.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0)
        inputs = (
            value.unflatten(-1, (self.num_heads, -1)),
            memory.level_shapes,
            self._locations(offsets, memory, reference),
            weights.unflatten(-1, samples[1:]),
        )
        if self.recompute:
            attended = run_recomputed(self, sample_levels, *inputs)
        else:
            attended = sample_levels(*inputs)
        return self.output_proj(attended.flatten(2))

    def _locations(self, offsets: Tensor, memory: Memory, reference: Tensor) -> Tensor:
        """(B, Q, M, L, P, 2) x, y in [0, 1] of the padded levels."""
        # Half precision knows too few places.
        offsets = offsets.to(torch.promote_types(offsets.dtype, reference.dtype))
        # (B, Q, 1, L, 1, 2 or 4): the padded maps are larger than the image.
        ratios = memory.valid_ratios[:, None, None, :, None, :]
        reference = reference[:, :, None, None, None, :]
        if reference.shape[-1] == 2:
            # One by one: a list of sizes would fix them where the model is exported.
            sizes = [
                torch.stack([offsets.new_full((), side) for side in (width, height)])
                for height, width in memory.level_shapes
            ]
            return reference * ratios + offsets / torch.stack(sizes)[:, None, :]
        half_sizes = 0.5 * reference[..., 2:] * ratios
        return reference[..., :2] * ratios + offsets / self.num_points * half_sizes


def sample_levels(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples; outside of a level everything is zero.

    Args:
        value: (B, S, M, D).
        level_shapes: height and width of each of the L levels, which make up S.
        locations: (B, Q, M, L, P, 2) x, y; 0 and 1 are the outer edges of the first and last cell.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M, D) in the type of `value`.
    """
    needs_gradient = torch.is_grad_enabled() and any(
        t.requires_grad for t in (value, locations, weights)
    )
    # Looking rows up is twice as fast on CPUs, but its backward pass is slow, and other runtimes
    # know grid_sample better.
    if value.device.type == "cpu" and not needs_gradient and not torch.compiler.is_compiling():
        return _look_up(value, level_shapes, locations, weights)
    return _grid_sample(value, level_shapes, locations, weights)


def _look_up(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """A bag of 4 * L * P weighted rows for every query and head."""
    batch, tokens, heads, channels = value.shape
    sides = locations.new_tensor([[width, height] for height, width in level_shapes])[:, None]
    places = locations * sides - 0.5
    low = places.floor()
    share = places - low
    starts = [0]
    for height, width in level_shapes[:-1]:
        starts.append(starts[-1] + height * width)
    # Of the two cells on either side along each axis: index, and weight (none outside the level).
    indices, shares = [], []
    for step in (0, 1):
        cell = low + step
        inside = (cell >= 0) & (cell < sides)
        indices.append(torch.minimum(cell.clamp_(min=0), sides - 1))
        shares.append((share if step else 1 - share) * inside)
    first = locations.new_tensor(starts)[:, None]
    image = (tokens * torch.arange(batch, device=value.device)).view(-1, 1, 1, 1, 1)
    head = torch.arange(heads, device=value.device)[:, None, None]
    rows, factors = [], []
    for down in (0, 1):
        row = indices[down][..., 1] * sides[..., 0] + first
        factor = shares[down][..., 1] * weights
        for right in (0, 1):
            cell = (row + indices[right][..., 0]).long()
            rows.append((cell + image) * heads + head)
            factors.append(factor * shares[right][..., 0])
    bags = batch * locations.shape[1] * heads
    summed = F.embedding_bag(
        torch.stack(rows, dim=-1).view(bags, -1),
        value.reshape(-1, channels),
        mode="sum",
        per_sample_weights=torch.stack(factors, dim=-1).view(bags, -1).to(value.dtype),
    )
    return summed.view(batch, -1, heads, channels)


def _grid_sample(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    dtype = value.dtype
    value, weights = value.to(locations.dtype), weights.to(locations.dtype)
    batch, _, heads, channels = value.shape
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, Q, P, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, B*M, Q, P)
    sizes = [height * width for height, width in level_shapes]
    summed = 0
    for level, grid, share, (height, width) in zip(
        value.split(sizes, dim=1), grids, shares, level_shapes, strict=True
    ):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (B*M, D, Q, P)
        # Level by level, for all levels' samples side by side would be a copy of the largest
        # tensors here, and of their gradients.
        summed = summed + (samples * share[:, None]).sum(-1)  # (B*M, D, Q)
    return summed.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).to(dtype)


def token_centres(level_shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Middle of every memory cell.

    Args:
        level_shapes: height and width of each of the L levels.
        valid_ratios: (B, L, 2) unpadded share of each level's width and height.

    Returns:
        (B, S, 2) x, y, normalised to the unpadded image; above 1 on padding.
    """
    centres = []
    for (height, width), ratio in zip(level_shapes, valid_ratios.unbind(1), strict=True):
        x = (torch.arange(width, device=ratio.device) + 0.5) / width
        y = (torch.arange(height, device=ratio.device) + 0.5) / height
        cells = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1)
        centres.append(cells.flatten(0, 1)[None] / ratio[:, None])
    return torch.cat(centres, dim=1)
