"""Position embeddings against their formula written as loops."""

import math

import pytest
import torch

from detr_d2.errors import UserError
from detr_d2.modeling.position import LearnedPositionEmbedding, SinePositionEmbedding


def padding_of(height, width, padded_height, padded_width):
    padding = torch.ones(1, padded_height, padded_width, dtype=torch.bool)
    padding[:, :height, :width] = False
    return padding


@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 1), (4, 2)])
def test_sine_formula(height, width):
    hidden_dim = 16
    embedding = SinePositionEmbedding(hidden_dim)(padding_of(height, width, 4, 5))
    assert embedding.shape == (1, hidden_dim, 4, 5)
    half = hidden_dim // 2
    for row in range(height):
        for column in range(width):
            # Rows and columns count from one; the last unpadded one is at 2 pi.
            y = 2 * math.pi * (row + 1) / height
            x = 2 * math.pi * (column + 1) / width
            for channel in range(hidden_dim):
                coordinate = y if channel < half else x
                pair = channel % half // 2
                angle = coordinate / 10000 ** (2 * pair / half)
                expected = math.cos(angle) if channel % 2 else math.sin(angle)
                actual = embedding[0, channel, row, column].item()
                assert actual == pytest.approx(expected, abs=1e-5), (row, column, channel)


def test_sine_does_not_depend_on_padding():
    embedding = SinePositionEmbedding(32)
    alone = embedding(padding_of(5, 3, 5, 3))
    batch = torch.cat((padding_of(5, 3, 9, 8), padding_of(9, 8, 9, 8)))
    together = embedding(batch)
    assert torch.equal(together[:1, :, :5, :3], alone)
    assert torch.isfinite(together).all()


def test_sine_needs_pairs_of_both_coordinates():
    with pytest.raises(UserError, match="HIDDEN_DIM must be divisible by 4, got 30"):
        SinePositionEmbedding(30)


def test_learned():
    learned = LearnedPositionEmbedding(8, max_size=6)
    embedding = learned(padding_of(3, 4, 5, 6).expand(2, -1, -1))
    assert embedding.shape == (2, 8, 5, 6)
    for row, column in ((0, 0), (4, 2), (1, 5)):
        expected = torch.cat(
            (learned.column_embedding.weight[column], learned.row_embedding.weight[row])
        )
        assert torch.equal(embedding[1, :, row, column], expected)


def test_learned_has_an_end():
    learned = LearnedPositionEmbedding(8)
    assert learned(padding_of(50, 50, 50, 50)).shape == (1, 8, 50, 50)
    for size in ((51, 3), (3, 51)):
        with pytest.raises(UserError, match=f"{size[0]}x{size[1]} is larger .*POSITION_EMBEDDING"):
            learned(padding_of(1, 1, *size))
