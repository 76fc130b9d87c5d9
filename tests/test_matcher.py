"""The Hungarian matcher against brute force, and every kind of emptiness."""

import itertools
import math

import pytest
import torch

from detr_d2.matcher import HungarianMatcher
from detr_d2.modeling.heads import SoftmaxClassification
from detr_d2.structures import LayerOutput, Target

from .helpers import NUM_CLASSES, random_outputs, random_targets


@pytest.fixture
def matcher():
    return HungarianMatcher(SoftmaxClassification(NUM_CLASSES, 0.1), 1.0, 5.0, 2.0)


def pairs_of(assignment, image):
    here = assignment.images == image
    return list(
        zip(assignment.queries[here].tolist(), assignment.objects[here].tolist(), strict=True)
    )


def cheapest_total(cost):
    """Lowest cost of any one-to-one pairing of min(Q, T) rows and columns, by trying all."""
    if len(cost) < len(cost[0]):
        cost = list(zip(*cost, strict=True))
    return min(
        sum(cost[row][column] for column, row in enumerate(rows))
        for rows in itertools.permutations(range(len(cost)), len(cost[0]))
    )


@pytest.mark.parametrize(("queries", "objects"), [(5, 1), (5, 3), (4, 4), (3, 5), (1, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_brute_force(matcher, queries, objects, seed):
    (output,) = random_outputs(1, queries, seed=seed)
    (target,) = random_targets([objects], seed=seed + 100)
    (assignment,) = matcher([output], [[target]])
    pairs = pairs_of(assignment, 0)
    assert len(pairs) == min(queries, objects)
    assert len({query for query, _ in pairs}) == len({obj for _, obj in pairs}) == len(pairs)

    with torch.no_grad():
        cost = matcher.pair_costs(output, target.classes[None], target.boxes[None])[0].tolist()
    total = sum(cost[query][obj] for query, obj in pairs)
    assert total == pytest.approx(cheapest_total(cost), abs=1e-5)


def test_cost_by_hand(matcher):
    # Probabilities 1/2, 1/4, 1/16 * 4.
    logits = torch.log(torch.tensor([[[8.0, 4.0, 1.0, 1.0, 1.0, 1.0]]]))
    output = LayerOutput(logits, torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]))
    classes = torch.tensor([[1, 0]])
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.3], [0.8, 0.5, 0.2, 0.2]]])
    cost = matcher.pair_costs(output, classes, boxes)
    # Second box: gap of 0.1 between two boxes of 0.2 x 0.2, hull 0.5 x 0.2.
    expected = [
        -1 / 4 + 5 * (0.2 + 0.1) - 2 * (0.04 / 0.12),
        -1 / 2 + 5 * 0.3 + 2 * (0.02 / 0.10),
    ]
    assert cost.shape == (1, 1, 2)
    assert cost[0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_order_is_by_image_and_query(matcher):
    (assignment,) = matcher(random_outputs(3), [random_targets([4, 2, 5])])
    places = list(zip(assignment.images.tolist(), assignment.queries.tolist(), strict=True))
    assert places == sorted(places)
    assert assignment.images.tolist() == [0] * 4 + [1] * 2 + [2] * 5


def test_images_and_layers_do_not_see_each_other(matcher):
    outputs = random_outputs(3, layers=2)
    targets = random_targets([4, 0, 6])
    together = matcher(outputs, [targets] * len(outputs))
    for layer, output in enumerate(outputs):
        for image, target in enumerate(targets):
            alone = LayerOutput(*(t[image : image + 1] for t in output))
            (assignment,) = matcher([alone], [[target]])
            assert pairs_of(assignment, 0) == pairs_of(together[layer], image)
    assert pairs_of(together[0], 2) != pairs_of(together[1], 2)


def test_layers_may_differ_in_queries(matcher):
    few, many = random_outputs(2, queries=3)[0], random_outputs(2, queries=9)[0]
    targets = random_targets([2, 5])
    together = matcher([few, many], [targets, targets])
    for assignment, output in zip(together, (few, many), strict=True):
        (alone,) = matcher([output], [targets])
        assert all(torch.equal(a, b) for a, b in zip(assignment, alone, strict=True))


@pytest.mark.parametrize("counts", [[0, 3], [3, 0], [0, 0]])
def test_images_without_objects(matcher, counts):
    (assignment,) = matcher(random_outputs(2), [random_targets(counts)])
    assert [len(pairs_of(assignment, image)) for image in range(2)] == counts
    assert all(indices.dtype == torch.int64 for indices in assignment)


def test_identical_objects_get_different_queries(matcher):
    (target,) = random_targets([1])
    twice = Target(target.classes.repeat(3), target.boxes.repeat(3, 1))
    (assignment,) = matcher(random_outputs(1), [[twice]])
    assert assignment.queries.unique().numel() == 3


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite(matcher, part, value):
    output = LayerOutput(*(t.detach().clone() for t in random_outputs(2)[0]))
    getattr(output, part)[1, 3, 0] = value
    with pytest.raises(FloatingPointError, match="predicted NaN or infinite boxes or logits"):
        matcher([output], [random_targets([2, 2])])


def test_half_precision_is_matched_in_single(matcher):
    output = LayerOutput(*(t.detach().half() for t in random_outputs(2)[0]))
    targets = random_targets([3, 4])
    single = LayerOutput(output.logits.float(), output.boxes.float())
    classes = torch.stack([target.classes[:3] for target in targets])
    boxes = torch.stack([target.boxes[:3] for target in targets])
    costs = matcher.pair_costs(output, classes, boxes)
    assert costs.dtype == torch.float32
    assert torch.equal(costs, matcher.pair_costs(single, classes, boxes))


def test_one_transfer_for_all_layers(matcher, monkeypatch):
    transfers = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self) or to_cpu(self))
    matcher(random_outputs(2, layers=6), [random_targets([3, 4])] * 6)
    assert len(transfers) == 1
    # Six layers, two images, seven queries, the fullest image's four objects.
    assert transfers[0].numel() == 6 * 2 * 7 * 4
