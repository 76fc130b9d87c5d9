"""Boxes against torchvision, by hand, and where they have no area."""

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import box_convert
from torchvision.ops import generalized_box_iou as torchvision_giou

from detr_d2.box_ops import box_area, cxcywh_to_xyxy, generalized_box_iou, xyxy_to_cxcywh
from detr_d2.losses import giou_box_loss, l1_box_loss

from .helpers import random_boxes

GENERATOR = torch.Generator().manual_seed(0)
BOXES = random_boxes(40, generator=GENERATOR)
OTHERS = random_boxes(30, generator=GENERATOR)
# A point, a horizontal line, a vertical line, a box and the same point again (cxcywh).
DEGENERATE = torch.tensor(
    [
        [0.5, 0.5, 0.0, 0.0],
        [0.5, 0.5, 0.2, 0.0],
        [0.5, 0.5, 0.0, 0.2],
        [0.4, 0.5, 0.2, 0.2],
        [0.5, 0.5, 0.0, 0.0],
    ]
)


def test_conversions_are_torchvisions():
    torch.testing.assert_close(cxcywh_to_xyxy(BOXES), box_convert(BOXES, "cxcywh", "xyxy"))
    corners = box_convert(BOXES, "cxcywh", "xyxy")
    torch.testing.assert_close(xyxy_to_cxcywh(corners), box_convert(corners, "xyxy", "cxcywh"))
    torch.testing.assert_close(xyxy_to_cxcywh(corners), BOXES)


def test_conversions_take_any_leading_shape():
    assert cxcywh_to_xyxy(BOXES.view(2, 4, 5, 4)).shape == (2, 4, 5, 4)
    assert xyxy_to_cxcywh(torch.zeros(0, 4)).shape == (0, 4)


def test_area():
    assert box_area(torch.tensor([[1.0, 2.0, 4.0, 7.0]])).tolist() == [15.0]


def test_pairwise_giou_is_torchvisions():
    boxes, others = cxcywh_to_xyxy(BOXES), cxcywh_to_xyxy(OTHERS)
    giou = generalized_box_iou(boxes[:, None], others[None])
    torch.testing.assert_close(giou, torchvision_giou(boxes, others))
    assert giou.min() < 0 < giou.max()


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        # Overlap: intersection 1, union 4 + 4 - 1 = 7, hull 9.
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7 - 2 / 9),
        # Apart: no intersection, union 2, hull 3.
        ([0, 0, 1, 1], [2, 0, 3, 1], -1 / 3),
        # One inside the other: the hull is the union.
        ([0, 0, 4, 4], [1, 1, 3, 3], 4 / 16),
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
    ],
)
def test_giou_by_hand(box, other, expected):
    box, other = torch.tensor(box).float(), torch.tensor(other).float()
    assert generalized_box_iou(box, other).item() == pytest.approx(expected, abs=1e-6)


def test_boxes_without_area_give_finite_values_and_gradients():
    boxes = DEGENERATE.clone().requires_grad_()
    corners = cxcywh_to_xyxy(boxes)
    giou = generalized_box_iou(corners[:, None], corners.detach()[None])
    assert torch.isfinite(giou).all()
    assert (giou.abs() <= 1).all()
    giou.sum().backward()
    assert torch.isfinite(boxes.grad).all()


def test_a_prediction_without_area_still_learns_its_size():
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.1]], requires_grad=True)
    giou_box_loss(boxes, target).backward()
    # Descending must widen the box.
    assert boxes.grad[0, 2] < 0


def test_gradients_in_double_precision():
    boxes = BOXES[:6].double().requires_grad_()
    others = OTHERS[:6].double().requires_grad_()
    assert gradcheck(giou_box_loss, (boxes, others))
    assert gradcheck(l1_box_loss, (boxes, others))


def test_losses_are_sums_over_pairs():
    predicted = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    target = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.6, 0.4, 0.2, 0.1]])
    # 0.2 + (0.1 + 0.1 + 0 + 0.1)
    assert l1_box_loss(predicted, target).item() == pytest.approx(0.5)
    first = 0.04 / 0.08
    # x: 0.4..0.6 and 0.5..0.7, y: 0.4..0.6 and 0.35..0.45: 0.1 * 0.05 in common, hull 0.3 * 0.25.
    union = 0.04 + 0.02 - 0.005
    second = 0.005 / union - (0.075 - union) / 0.075
    assert giou_box_loss(predicted, target).item() == pytest.approx(2 - first - second)


def test_no_pairs():
    nothing = torch.zeros(0, 4, requires_grad=True)
    loss = giou_box_loss(nothing, torch.zeros(0, 4)) + l1_box_loss(nothing, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0
