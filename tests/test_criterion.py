"""The set criterion by hand, against transformers' DETR loss, and in every kind of batch."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

from detr_d2.criterion import SetCriterion, cardinality_error, class_error
from detr_d2.losses import paired_iou
from detr_d2.matcher import HungarianMatcher
from detr_d2.modeling.heads import (
    SigmoidClassification,
    SoftmaxClassification,
    VarifocalClassification,
)
from detr_d2.structures import LayerOutput, Predictions, Target

from .helpers import (
    NUM_CLASSES,
    make_criterion,
    random_inputs,
    random_outputs,
    random_targets,
    tiny_cfg,
)

# Two queries, two classes. Probabilities 1/2, 1/4, 1/4 and 1/8, 1/8, 3/4.
LOGITS = torch.log(torch.tensor([[[2.0, 1.0, 1.0], [1.0, 1.0, 6.0]]]))
BOXES = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
TARGET = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.4, 0.2]]))


def total(losses):
    return sum(losses.values())


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def test_one_image_by_hand():
    losses = make_criterion(num_classes=2)(Predictions([LayerOutput(LOGITS, BOXES)]), [TARGET])
    assert values(losses) == pytest.approx(
        {
            # Weighted mean over both queries: the second has no object, its weight is 0.1.
            "loss_ce": (-math.log(1 / 2) - 0.1 * math.log(3 / 4)) / 1.1,
            "loss_bbox": 5 * 0.2,
            # One box inside the other.
            "loss_giou": 2 * (1 - 0.04 / 0.08),
        }
    )


def test_normalised_by_boxes_of_the_batch_not_by_images():
    """A second image with two objects, both predicted without error: three boxes in all."""
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.4]])
    classes = torch.tensor([1, 0])
    logits = torch.log(torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 1.0]]))
    output = LayerOutput(torch.cat((LOGITS, logits[None])), torch.cat((BOXES, boxes[None])))
    losses = make_criterion(num_classes=2)(Predictions([output]), [TARGET, Target(classes, boxes)])
    assert values(losses) == pytest.approx(
        {
            "loss_ce": (-3 * math.log(1 / 2) - 0.1 * math.log(3 / 4)) / 3.1,
            "loss_bbox": 5 * 0.2 / 3,
            "loss_giou": 2 * 0.5 / 3,
        }
    )


def test_names_of_deep_supervision():
    losses = make_criterion()(Predictions(random_outputs(2, layers=6)), random_targets([3, 2]))
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    suffixes = ("", "_0", "_1", "_2", "_3", "_4")
    assert set(losses) == {kind + suffix for kind in kinds for suffix in suffixes}


def test_every_layer_is_matched_and_compared_on_its_own():
    outputs, targets = random_outputs(2, layers=3), random_targets([3, 2])
    losses = make_criterion()(Predictions(outputs), targets)
    for suffix, output in zip(("_0", "_1", ""), outputs, strict=True):
        alone = make_criterion()(Predictions([output]), targets)
        for name, loss in alone.items():
            assert losses[name + suffix].item() == pytest.approx(loss.item()), name + suffix


def test_without_deep_supervision_only_the_last_layer_counts():
    outputs, targets = random_outputs(2, layers=3), random_targets([3, 2])
    losses = make_criterion(deep_supervision=False)(Predictions(outputs), targets)
    assert values(losses) == values(make_criterion()(Predictions(outputs[-1:]), targets))


def test_weights():
    outputs, targets = random_outputs(2, layers=2), random_targets([3, 2])
    plain = values(make_criterion((1, 1, 1))(Predictions(outputs), targets))
    weighted = values(make_criterion((2, 3, 7))(Predictions(outputs), targets))
    factors = {"loss_ce": 2, "loss_bbox": 3, "loss_giou": 7}
    expected = {name: plain[name] * factors[name.removesuffix("_0")] for name in plain}
    assert weighted == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[0, 3], [3, 0], [0, 0], [9, 1]])
def test_agrees_with_transformers(counts):
    """9 objects are more than there are queries."""
    hub_loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
    pytest.importorskip("scipy")
    outputs, targets = random_outputs(2, layers=3), random_targets(counts)
    config = SimpleNamespace(
        class_cost=1, bbox_cost=5, giou_cost=2, num_labels=NUM_CLASSES, eos_coefficient=0.1,
        auxiliary_loss=True, bbox_loss_coefficient=5, giou_loss_coefficient=2, decoder_layers=3,
    )  # fmt: skip
    hub_total, hub_losses, _ = hub_loss.ForObjectDetectionLoss(
        outputs[-1].logits,
        [{"class_labels": target.classes, "boxes": target.boxes} for target in targets],
        torch.device("cpu"),
        outputs[-1].boxes,
        config,
        torch.stack([output.logits for output in outputs]),
        torch.stack([output.boxes for output in outputs]),
    )
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    losses = make_criterion()(Predictions(outputs), targets)
    for name, loss in losses.items():
        weight = weights["_".join(name.split("_")[:2])]
        assert loss.item() == pytest.approx(weight * hub_losses[name].item(), rel=1e-5), name
    assert total(losses).item() == pytest.approx(hub_total.item(), rel=1e-5)

    gradients = torch.autograd.grad(total(losses), outputs[0])
    hub_gradients = torch.autograd.grad(hub_total, outputs[0])
    torch.testing.assert_close(gradients, hub_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", [[0, 3], [0, 0], [12, 1]])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_every_parameter_gets_a_finite_gradient(counts, deep_supervision):
    """Also without any box: a parameter without gradient stops distributed training."""
    model = build_model(tiny_cfg("MODEL.DETR.DEEP_SUPERVISION", deep_supervision))
    losses = model.train()(random_inputs([(64, 80), (96, 64)], counts))
    assert len(losses) == (9 if deep_supervision else 3)
    assert all(math.isfinite(loss) for loss in values(losses).values())
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    box_gradient = model.transformer.decoder.heads[0].box_head.layers[2].weight.grad
    assert box_gradient.any() == (sum(counts) > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_single_precision_whatever_the_outputs_are(dtype, autocast):
    low = [LayerOutput(*(t.detach().to(dtype) for t in o)) for o in random_outputs(2, layers=2)]
    targets = random_targets([3, 2])
    single = [LayerOutput(o.logits.float(), o.boxes.float()) for o in low]
    expected = make_criterion()(Predictions(single), targets)
    criterion, seen = make_criterion(), []
    criterion.matcher.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = criterion(Predictions(low), targets)
    assert seen == [False]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert values(losses) == values(expected)


def test_accumulated_batches_are_the_whole_batch():
    """Four images at once, or in batches of one, two and one, the last one without objects."""
    counts = [3, 1, 9, 0]
    outputs, targets = random_outputs(4, layers=2), random_targets(counts)
    leaves = [t for output in outputs for t in output]
    whole = make_criterion()(Predictions(outputs), targets)
    expected = torch.autograd.grad(total(whole), leaves)

    parts = []
    for images in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part = [LayerOutput(o.logits[images], o.boxes[images]) for o in outputs]
        parts.append(make_criterion()(Predictions(part), targets[images], object_counts=counts))
    for name, loss in whole.items():
        assert sum(part[name].item() for part in parts) == pytest.approx(loss.item(), rel=1e-5)
    actual = torch.autograd.grad(sum(total(part) for part in parts), leaves)
    torch.testing.assert_close(actual, expected)


def test_losses_without_gradients_wait_for_no_other_process(monkeypatch):
    """Validation losses: processes have different numbers of batches."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: pytest.fail("waits"))
    outputs = Predictions([LayerOutput(LOGITS, BOXES)])
    with torch.no_grad():
        losses = make_criterion(num_classes=2)(outputs, [TARGET])
    monkeypatch.undo()
    assert losses == make_criterion(num_classes=2)(outputs, [TARGET])


def test_diagnostics_go_to_the_event_storage_only():
    output = LayerOutput(LOGITS, BOXES)
    with EventStorage(0) as storage:
        losses = make_criterion(num_classes=2)(Predictions([output]), [TARGET])
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou"}
    # The matched query says class 0 and is right; one query of two says "object".
    assert latest == {"class_error": 0.0, "cardinality_error": 0.0}
    with EventStorage(1) as storage:
        make_criterion(num_classes=2)(Predictions([output]), [TARGET])
        assert storage.latest() == {}
    with EventStorage(0) as storage, torch.no_grad():  # a validation beside a training
        make_criterion(num_classes=2)(Predictions([output]), [TARGET])
        assert storage.latest() == {}


def test_diagnostics_by_hand():
    logits = torch.tensor([[3.0, 1, 2], [0, 5, 1], [1, 2, 9], [4, 0, 0]])
    # Predicted 0, 1, 2, 0.
    assert class_error(logits, torch.tensor([0, 1, 1, 1])).item() == 50
    assert math.isfinite(class_error(logits[:0], torch.tensor([], dtype=torch.int64)))
    # One and three objects predicted, two and zero true.
    background = torch.tensor([[True, True, False], [False, False, False]])
    assert cardinality_error(background, random_targets([2, 0])).item() == (1 + 3) / 2


def test_class_loss_gradient_in_double_precision():
    classification = SoftmaxClassification(4, no_object_weight=0.1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([[0, 4, 3], [4, 4, 1]])
    assert gradcheck(lambda x: classification.loss(x, classes, torch.tensor(3.3)), logits)


def test_class_loss_is_pytorchs_weighted_mean():
    classification = SoftmaxClassification(4, no_object_weight=0.1)
    logits = random_outputs(2, queries=3, num_classes=4)[0].logits
    classes = torch.tensor([[0, 4, 3], [4, 4, 1]])
    loss = classification.loss(logits, classes, classification.normalizer(3, [2, 1]))
    weight = torch.tensor([1, 1, 1, 1, 0.1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight)
    torch.testing.assert_close(loss, expected)


def test_more_objects_than_queries_count_as_queries_in_the_class_normaliser():
    classification = SoftmaxClassification(4, no_object_weight=0.1)
    assert classification.normalizer(3, [2, 7, 0]) == pytest.approx(2 + 0.1 + 3 + 0.3)


def test_nothing_looks_at_a_value_on_the_host(monkeypatch):
    """On a GPU such a look makes the host wait; the one transfer belongs to the matcher.

    Real tensors: some backward passes, such as that of `prod`, look at values only there.
    """
    logging.getLogger("torch.profiler").setLevel(logging.ERROR)
    criterion = make_criterion()
    outputs, targets = random_outputs(2, layers=3), random_targets([3, 0])
    assignments = criterion.matcher(outputs, [targets] * 3)
    monkeypatch.setattr("detr_d2.matcher._assign", lambda cost, counts: assignments.pop(0))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total(criterion(Predictions(outputs), targets)).backward()
    operators = {event.key for event in profiler.key_averages()}
    assert "aten::cdist" in operators or "aten::_cdist_forward" in operators
    assert any("IndexPut" in name or "IndexBackward" in name for name in operators)
    assert not operators & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


# Classes that say how good the box is


def test_varifocal_by_hand():
    """Zhang et al., equation 2: positives q BCE(p, q), negatives (1 - alpha) p^gamma BCE(p, 0)."""
    part = VarifocalClassification(2, alpha=0.25, gamma=2.0)
    probability = torch.tensor([[[0.7, 0.2], [0.4, 0.1]]], dtype=torch.float64)
    logits = probability.logit()
    classes, iou = torch.tensor([[0, 2]]), torch.tensor([[0.6, 0.0]], dtype=torch.float64)
    loss = part.loss(logits, classes, torch.tensor(2.0), iou=iou)
    positive = 0.6 * -(0.6 * math.log(0.7) + 0.4 * math.log(0.3))
    negatives = sum(0.75 * p**2 * -math.log(1 - p) for p in (0.2, 0.4, 0.1))
    assert loss.item() == pytest.approx((positive + negatives) / 2)


def test_varifocal_weights_are_constants():
    """The gradient is that of the entropy alone, times the weight."""
    part = VarifocalClassification(1)
    logits = torch.tensor([[[0.3], [-0.8]]], dtype=torch.float64, requires_grad=True)
    iou = torch.tensor([[0.6, 0.0]], dtype=torch.float64)
    part.loss(logits, torch.tensor([[0, 1]]), torch.tensor(1.0), iou=iou).backward()
    p = logits.detach().sigmoid().flatten()
    expected = torch.stack((0.6 * (p[0] - 0.6), 0.75 * p[1] ** 2 * p[1]))
    torch.testing.assert_close(logits.grad.flatten(), expected)


def test_iou_is_a_target_and_the_plain_one():
    """Half of each box is common: 1/3 (generalised, of boxes side by side, it would be less)."""
    first = torch.tensor([[0.4, 0.5, 0.4, 0.2], [0.2, 0.2, 0.2, 0.2]])
    second = torch.tensor([[0.6, 0.5, 0.4, 0.2], [0.8, 0.8, 0.2, 0.2]])
    torch.testing.assert_close(paired_iou(first, second), torch.tensor([1 / 3, 0.0]))
    classification = VarifocalClassification(2)
    matcher = HungarianMatcher(classification, 1.0, 5.0, 2.0)
    criterion = SetCriterion(matcher, classification, 1.0, 0.0, 0.0)
    boxes = BOXES.clone().requires_grad_()
    losses = criterion(Predictions([LayerOutput(LOGITS[..., :2], boxes)]), [TARGET])
    assert not losses["loss_ce"].requires_grad  # as the logits do not


def test_without_deep_supervision_denoising_has_losses_of_the_last_layer_alone():
    model = build_model(tiny_cfg("MODEL.DETR.DEEP_SUPERVISION", False, config="dn_tiny")).train()
    losses = model(random_inputs([(64, 96)], [2]))
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    assert losses.keys() == {kind + suffix for kind in kinds for suffix in ("", "_dn")}


@pytest.mark.parametrize("classification", [SigmoidClassification(2), VarifocalClassification(2)])
def test_saturated_logits_have_finite_costs(classification):
    logits = torch.tensor([[[200.0, -200.0], [-200.0, 200.0]]])
    assert classification.matching_cost(logits, torch.tensor([[0, 1]])).isfinite().all()
