"""Necks: which map becomes which level, and what the memory knows about each."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from detr_d2.errors import UserError
from detr_d2.modeling.neck import MultiScaleNeck, padding_mask, valid_ratio
from detr_d2.modeling.position import SinePositionEmbedding

from .helpers import tiny_cfg

C = 32


def make_neck(num_levels=4):
    torch.manual_seed(0)
    return MultiScaleNeck(["fine", "coarse"], [6, 10], C, num_levels, SinePositionEmbedding(C))


def make_features():
    return {
        "coarse": torch.randn(2, 10, 6, 8),
        "fine": torch.randn(2, 6, 12, 16),
        "unused": torch.randn(2, 3, 1, 1),
    }


@torch.no_grad()
def test_levels_by_hand():
    """Two maps; the third level is made from the last map, the fourth from the third level."""
    neck, features = make_neck(), make_features()
    padding = padding_mask(torch.tensor([(96, 128), (48, 128)]), (96, 128))
    memory = neck(features, padding)
    assert memory.level_shapes == ((12, 16), (6, 8), (3, 4), (2, 2))
    projections = neck.projections
    third = projections[2](features["coarse"])
    levels = [
        projections[0](features["fine"]),
        projections[1](features["coarse"]),
        third,
        projections[3](third),
    ]
    expected = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    torch.testing.assert_close(memory.tokens, expected)
    # Per level and group of channels the norm sees the whole map, padding included.
    group = levels[0].unflatten(1, (32, -1))
    torch.testing.assert_close(group.mean((2, 3, 4)), torch.zeros(2, 32), rtol=0, atol=1e-5)
    # A level's embedding comes on top of its positions.
    sizes = [h * w for h, w in memory.level_shapes]
    for index, part in enumerate(memory.positions.split(sizes, dim=1)):
        mask = memory.padding.split(sizes, dim=1)[index].view(2, *memory.level_shapes[index])
        sine = neck.position(mask).flatten(2).transpose(1, 2)
        torch.testing.assert_close(part, sine + neck.level_embedding[index])
    # The second image is half as high: rows 0 and 1 of 3 begin within it.
    torch.testing.assert_close(memory.valid_ratios[1, 0], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(memory.valid_ratios[1, 2], torch.tensor([1.0, 2 / 3]))
    assert memory.padding.sum(1).tolist() == [0, 6 * 16 + 3 * 8 + 1 * 4 + 1 * 2]


def test_valid_ratio_is_width_and_height():
    padding = torch.ones(1, 4, 8, dtype=torch.bool)
    padding[0, :3, :2] = False
    torch.testing.assert_close(valid_ratio(padding), torch.tensor([[0.25, 0.75]]))


def test_initial_values():
    neck = make_neck()
    for convolution, norm in neck.projections:
        fan = convolution.weight[0].numel() + convolution.weight[:, 0].numel()
        bound = (6 / fan) ** 0.5
        assert 0.95 * bound < convolution.weight.abs().max() <= bound
        assert not convolution.bias.any()
        assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 32
    assert neck.level_embedding.std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("NUM_FEATURE_LEVELS", 1), "NUM_FEATURE_LEVELS is 1, but .* has 2 entries"),
        (("HIDDEN_DIM", 40), "HIDDEN_DIM must be divisible by 32, .* got 40"),
        (("NECK", "single_scale"), 'set NECK to "multi_scale"'),
        (("IN_FEATURES", ["res3", "res9"]), "names 'res9', but .* gives only res3, res4"),
    ],
)
def test_wrong_configs_are_refused_in_a_sentence(options, message):
    key, value = options
    with pytest.raises(UserError, match=message):
        build_model(tiny_cfg(f"MODEL.DETR.{key}", value, config="deformable_tiny"))


def test_as_many_levels_as_maps_by_default():
    cfg = tiny_cfg("MODEL.DETR.NUM_FEATURE_LEVELS", 0, config="deformable_tiny")
    assert len(build_model(cfg).neck.projections) == 2
