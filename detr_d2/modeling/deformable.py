"""Multi-scale deformable attention (Deformable DETR, Zhu et al., 2021, section 4.1).

Shapes: B images, Q queries, S memory tokens, L levels, M heads, P sampling points per head and
level, C channels, D = C / M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import Memory, QueryPosition
from .attention import check_heads, with_position
from .recompute import run as run_recomputed

# Their indices and weights take 12 MB, which larger caches hold, and C libraries keep at hand.
_SAMPLES_PER_BLOCK = 2**18


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
        # The padded maps are larger than the image. Ratios are repeated for each point, for
        # operations are slow where short dimensions are broadcast.
        ratios = memory.valid_ratios[:, None, None, :, None, :]  # (B, 1, 1, L, 1, 2)
        ratios = ratios.repeat(1, 1, 1, 1, self.num_points, 1)
        reference = reference[:, :, None, None, None, :]
        if reference.shape[-1] == 2:
            # One by one: a list of sizes would fix them where the model is exported.
            sizes = [
                torch.stack([offsets.new_full((), side) for side in (width, height)])
                for height, width in memory.level_shapes
            ]
            cells = torch.stack(sizes)[:, None, :].repeat(self.num_heads, 1, self.num_points, 1)
            return torch.addcdiv(reference * ratios, offsets, cells)
        steps = reference[..., 2:] * ratios * (0.5 / self.num_points)
        return torch.addcmul(reference[..., :2] * ratios, offsets, steps)


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
    # Looking rows up is several times as fast on CPUs, but its backward pass is slow, and other
    # runtimes know grid_sample better.
    if value.device.type == "cpu" and not needs_gradient and not torch.compiler.is_compiling():
        return _look_up(value, level_shapes, locations, weights)
    return _grid_sample(value, level_shapes, locations, weights)


def _look_up(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """In blocks of queries, whose intermediate results stay in the cache."""
    batch, _, *samples, _ = locations.shape
    block = max(1, _SAMPLES_PER_BLOCK // (batch * math.prod(samples)))
    bordered, starts = _with_border(value, level_shapes)
    blocks = zip(locations.split(block, dim=1), weights.split(block, dim=1), strict=True)
    summed = [_look_up_block(bordered, starts, level_shapes, *each) for each in blocks]
    return torch.cat(summed, dim=1)


def _with_border(
    value: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[int]]:
    """(B, S, M, D) -> (B, S', M, D), and where in S' each level starts. It has zeros about it, so
    that a sample needs not know whether its four cells are inside. The column after a row's last
    cell is also the one before the next row's first; above are one row of zeros, below two, for a
    sample on the lower border also reads what is below that, with weight 0."""
    sizes = [(height + 3) * (width + 1) for height, width in level_shapes]
    # One more before the first row's first cell, and one after all.
    bordered = value.new_zeros(value.shape[0], sum(sizes) + 2, *value.shape[2:])
    levels = value.split([height * width for height, width in level_shapes], dim=1)
    places = bordered[:, 1:-1].split(sizes, dim=1)
    for place, level, (height, width) in zip(places, levels, level_shapes, strict=True):
        inside = place.unflatten(1, (height + 3, width + 1))[:, 1 : height + 1, :width]
        inside.copy_(level.unflatten(1, (height, width)))
    return bordered, list(accumulate(sizes[:-1], initial=1))


def _look_up_block(
    bordered: Tensor,
    starts: list[int],
    level_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """A bag of 4 * L * P weighted rows for every query and head."""
    batch, tokens, heads, channels = bordered.shape
    points = locations.shape[4]

    def of_samples(of_levels: list[int]) -> Tensor:
        """(M * L * P,), for operations are slow where short dimensions are broadcast."""
        return locations.new_tensor(of_levels)[:, None].expand(heads, -1, points).flatten()

    height, width = (of_samples(list(sides)) for sides in zip(*level_shapes, strict=True))
    # In cells, (B, Q, M * L * P) like all that follows; what is far outside lies on the border.
    before = -torch.ones_like(width)
    x = torch.clamp(locations[..., 0].flatten(2) * width - 0.5, before, width)
    y = torch.clamp(locations[..., 1].flatten(2) * height - 0.5, before, height)
    left, top = x.floor(), y.floor()
    # What is not a number has a cell, too; its weights say what it is.
    cell = ((top + 1) * (width + 1) + (left + of_samples(starts))).nan_to_num().long()
    image = tokens * torch.arange(batch, device=cell.device)[:, None, None]
    head = torch.arange(heads, device=cell.device).repeat_interleave(len(level_shapes) * points)
    row = (cell + image) * heads + head
    below = row + ((width + 1) * heads).long()
    rows = torch.stack((row, row + heads, below, below + heads), dim=-1)
    lower = weights.flatten(2) * (y - top)
    upper = weights.flatten(2) - lower
    upper_right, lower_right = upper * (x - left), lower * (x - left)
    shares = (upper - upper_right, upper_right, lower - lower_right, lower_right)
    bags = batch * locations.shape[1] * heads
    summed = F.embedding_bag(
        rows.view(bags, -1),
        bordered.view(-1, channels),
        mode="sum",
        per_sample_weights=torch.stack(shares, dim=-1).view(bags, -1).to(bordered.dtype),
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
