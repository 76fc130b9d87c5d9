"""Deformable attention against a loop over its sampling points, and what must change nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from detr_d2.modeling import deformable
from detr_d2.modeling.deformable import (
    DeformableAttention,
    _grid_sample,
    _look_up,
    sample_levels,
    token_centres,
)
from detr_d2.structures import Memory, QueryPosition

C, HEADS, POINTS = 8, 2, 3
SHAPES = ((4, 6), (2, 3))
S = 4 * 6 + 2 * 3


def bilinear(level, x, y):
    """(H, W, D) cells; x, y in [0, 1] from the outer edge of the first cell to that of the last."""
    height, width, channels = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels, dtype=level.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * level[i, j]
    return total


def loop(value, shapes, locations, weights):
    batch, _, heads, channels = value.shape
    result = torch.zeros(batch, locations.shape[1], heads, channels, dtype=value.dtype)
    for b, q, m in torch.cartesian_prod(*map(torch.arange, result.shape[:3])).tolist():
        first = 0
        for level, (height, width) in enumerate(shapes):
            cells = value[b, first : first + height * width, m].view(height, width, channels)
            first += height * width
            for point in range(locations.shape[4]):
                x, y = locations[b, q, m, level, point].tolist()
                result[b, q, m] += weights[b, q, m, level, point] * bilinear(cells, x, y)
    return result


def random_samples(batch=2, queries=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, S, HEADS, C // HEADS, generator=generator, dtype=dtype)
    shape = (batch, queries, HEADS, len(SHAPES), POINTS)
    # Some of the places lie outside.
    locations = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(*shape, generator=generator, dtype=dtype)
    return value, locations, weights


def random_memory(valid=((4, 6), (3, 4)), shapes=SHAPES, seed=0):
    """Images whose unpadded part of the first level is as large as `valid` says, on every level
    the same share; padding holds large values."""
    generator = torch.Generator().manual_seed(seed)
    tokens, padding, ratios = [], [], []
    for height, width in shapes:
        level = 100 * torch.randn(len(valid), height, width, C)
        mask = torch.ones(len(valid), height, width, dtype=torch.bool)
        shares = []
        for image, (rows, columns) in enumerate(valid):
            rows = math.ceil(rows * (height / shapes[0][0]))
            columns = math.ceil(columns * (height / shapes[0][0]))
            mask[image, :rows, :columns] = False
            level[image, :rows, :columns] = torch.randn(rows, columns, C, generator=generator)
            shares.append([columns / width, rows / height])
        tokens.append(level.flatten(1, 2))
        padding.append(mask.flatten(1))
        ratios.append(torch.tensor(shares))
    return Memory(
        tokens=torch.cat(tokens, 1),
        positions=torch.zeros(len(valid), sum(h * w for h, w in shapes), C),
        padding=torch.cat(padding, 1),
        level_shapes=shapes,
        valid_ratios=torch.stack(ratios, 1),
    )


@pytest.fixture
def attention():
    torch.manual_seed(0)
    module = DeformableAttention(C, HEADS, len(SHAPES), POINTS)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("sample", [_grid_sample, _look_up])
def test_samples_equal_a_loop(sample):
    value, locations, weights = random_samples()
    actual = sample(value, SHAPES, locations, weights)
    torch.testing.assert_close(actual, loop(value, SHAPES, locations, weights))


@pytest.mark.parametrize(("queries", "blocks"), [(0, [1, 1, 1, 1, 1]), (2, [2, 2, 1])])
def test_rows_are_looked_up_in_blocks_of_queries(queries, blocks, monkeypatch):
    """At least one query of each image at a time."""
    samples = 2 * HEADS * len(SHAPES) * POINTS
    monkeypatch.setattr(deformable, "_SAMPLES_PER_BLOCK", queries * samples)
    look_up, sizes = deformable._look_up_block, []
    monkeypatch.setattr(
        deformable, "_look_up_block", lambda *a: sizes.append(a[3].shape[1]) or look_up(*a)
    )
    value, locations, weights = random_samples(queries=5)
    actual = _look_up(value, SHAPES, locations, weights)
    assert sizes == blocks
    torch.testing.assert_close(actual, loop(value, SHAPES, locations, weights))


@pytest.mark.parametrize("sample", [_grid_sample, _look_up])
def test_samples_on_edges_and_far_outside(sample):
    """Cell by cell about a level of ones: at cell centres exactly one, half a cell outside half of
    it, and nothing from a whole cell outside on."""
    value = torch.ones(1, S, 1, 2)
    height, width = SHAPES[0]
    columns = torch.tensor([-1e30, -2.5, -1.0, -0.5, 0, 2, width - 1, width - 0.5, width, 1e30])
    locations = torch.full((1, len(columns), 1, 2, 1, 2), 0.5)
    locations[..., 0, :, 0] = ((columns + 0.5) / width)[None, :, None, None]
    weights = torch.zeros(1, len(columns), 1, 2, 1)
    weights[..., 0, :] = 1
    actual = sample(value, SHAPES, locations, weights)[0, :, 0, 0]
    torch.testing.assert_close(actual, torch.tensor([0, 0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]))


def test_places_that_are_no_numbers_are_samples_that_are_none():
    """A diverged model, also with one head: no index that does not exist."""
    value = torch.ones(1, S, 1, 2)
    locations = torch.full((1, 2, 1, 2, 1, 2), 0.5)
    locations[:, 1] = math.nan
    actual = _look_up(value, SHAPES, locations, torch.full((1, 2, 1, 2, 1), 0.5))
    assert torch.equal(actual[0, 0], torch.ones(1, 2)) and actual[0, 1].isnan().all()


def test_both_ways_to_sample_are_used(monkeypatch):
    """Rows are looked up where nobody asks for gradients."""
    used = []
    for name, function in (("_grid_sample", _grid_sample), ("_look_up", _look_up)):
        monkeypatch.setattr(
            f"detr_d2.modeling.deformable.{name}",
            lambda *a, name=name, function=function: used.append(name) or function(*a),
        )
    value, locations, weights = random_samples()
    sample_levels(value, SHAPES, locations, weights)
    sample_levels(value.requires_grad_(), SHAPES, locations, weights)
    with torch.no_grad():
        sample_levels(value, SHAPES, locations, weights)
    assert used == ["_look_up", "_grid_sample", "_look_up"]


def test_gradients_of_samples_in_double_precision():
    inputs = [t.requires_grad_() for t in random_samples(batch=1, queries=2)]
    assert gradcheck(lambda v, p, w: sample_levels(v, SHAPES, p, w), inputs)


@pytest.mark.parametrize("numbers", [2, 4])
def test_gradients_of_the_module_in_double_precision(attention, numbers):
    attention.double()
    memory = random_memory()
    memory.valid_ratios = memory.valid_ratios.double()
    content = torch.randn(2, 3, C, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, S, C, dtype=torch.float64, requires_grad=True)
    reference = (0.2 + 0.6 * torch.rand(2, 3, numbers, dtype=torch.float64)).requires_grad_()

    def attend(content, tokens, reference):
        position = QueryPosition(torch.ones_like(content))
        return attention(content, position, replace(memory, tokens=tokens), reference)

    assert gradcheck(attend, (content, tokens, reference))


@pytest.mark.parametrize("numbers", [2, 4])
def test_places_by_hand(attention, numbers):
    """Offsets count cells about a point, and halves of the size, per point, about a box."""
    memory = random_memory()
    reference = torch.rand(2, 3, numbers)
    offsets = torch.randn(2, 3, HEADS, len(SHAPES), POINTS, 2)
    places = attention._locations(offsets, memory, reference)
    b, q, m, level, p = 1, 2, 1, 0, 2
    height, width = SHAPES[level]
    for axis, cells in enumerate((width, height)):
        share = memory.valid_ratios[b, level, axis]
        offset = offsets[b, q, m, level, p, axis]
        if numbers == 2:
            expected = reference[b, q, axis] * share + offset / cells
        else:
            expected = share * (
                reference[b, q, axis] + offset / POINTS * reference[b, q, 2 + axis] / 2
            )
        torch.testing.assert_close(places[b, q, m, level, p, axis], expected)


@torch.no_grad()
def test_the_whole_module_by_hand(attention):
    memory = random_memory()
    content, embedding = torch.randn(2, 3, C), torch.randn(2, 3, C)
    reference = torch.rand(2, 3, 4)
    query = content + embedding
    value = attention.value_proj(memory.tokens)
    value[memory.padding] = 0
    offsets = attention.sampling_offsets(query).view(2, 3, HEADS, len(SHAPES), POINTS, 2)
    # Over levels and points together, the weights of a head sum to one.
    weights = attention.attention_weights(query).view(2, 3, HEADS, -1).softmax(-1)
    attended = loop(
        value.view(2, S, HEADS, -1),
        SHAPES,
        attention._locations(offsets, memory, reference),
        weights.view(2, 3, HEADS, len(SHAPES), POINTS),
    )
    expected = attention.output_proj(attended.flatten(2))
    actual = attention(content, QueryPosition(embedding), memory, reference)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("numbers", [2, 4])
@torch.no_grad()
def test_padding_changes_nothing(attention, numbers):
    content, reference = torch.randn(1, 3, C), torch.rand(1, 3, numbers)
    if numbers == 2:  # offsets from a point count cells, of which a padded map has more per image
        attention.sampling_offsets.weight.mul_(0.1)
    tight = random_memory(valid=[(4, 6)])
    padded = random_memory(valid=[(4, 6)], shapes=((8, 10), (4, 5)))
    outputs = [attention(content, QueryPosition(None), m, reference) for m in (tight, padded)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_initial_samples_look_in_all_directions():
    """The first of four heads looks right, the second down, each point one cell further."""
    attention = DeformableAttention(8, 4, num_levels=2, num_points=3)
    offsets = attention.sampling_offsets(torch.randn(1, 1, 8)).view(4, 2, 3, 2)
    for level in range(2):
        for point in range(3):
            expected = (point + 1) * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
            torch.testing.assert_close(offsets[:, level, point], expected, rtol=0, atol=1e-5)
    weights = attention.attention_weights(torch.randn(1, 1, 8))
    assert not weights.any()


def test_token_centres_by_hand():
    centres = token_centres(((1, 2), (1, 1)), torch.tensor([[[1.0, 1.0], [0.5, 0.5]]]))
    expected = torch.tensor([[[0.25, 0.5], [0.75, 0.5], [1.0, 1.0]]])
    torch.testing.assert_close(centres, expected)


@torch.no_grad()
def test_bfloat16_places_are_exact(attention):
    """Values may be coarse; places in the image may not."""
    value, locations, weights = random_samples(dtype=torch.float32)
    exact = sample_levels(value, SHAPES, locations, weights)
    coarse = sample_levels(value.bfloat16(), SHAPES, locations, weights.bfloat16())
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), exact, rtol=0.03, atol=0.05)
    memory, content = random_memory(), torch.randn(2, 3, C)
    reference = torch.rand(2, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(content, QueryPosition(None), memory, reference)
    assert output.dtype == torch.bfloat16
    # Sides that bfloat16 does not know, and a place that it does not, either.
    memory = replace(memory, level_shapes=((257, 301), (129, 151)))
    offsets = torch.ones(2, 3, HEADS, len(SHAPES), POINTS, 2)
    exact = attention._locations(offsets, memory, reference)
    assert torch.equal(attention._locations(offsets.bfloat16(), memory, reference), exact)


@torch.no_grad()
def test_export_of_any_number_of_queries(attention):
    memory = random_memory()

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, content, reference):
            return self.attention(content, QueryPosition(None), memory, reference)

    queries = torch.export.Dim("queries", min=2, max=100)
    inputs = (torch.randn(2, 3, C), torch.rand(2, 3, 4))
    program = torch.export.export(Module(), inputs, dynamic_shapes=({1: queries}, {1: queries}))
    content, reference = torch.randn(2, 7, C), torch.rand(2, 7, 4)
    expected = attention(content, QueryPosition(None), memory, reference)
    torch.testing.assert_close(program.module()(content, reference), expected)
