"""The official implementations' numbers: logits, boxes, assignments, losses, detections."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from detr_d2 import get_detr_cfg
from detr_d2.checkpoint import load_weights

from .helpers import CONFIGS
from .reference import BATCHES, FOLDER, make_input, make_state_dict

# model -> its config, largest difference of logits and of boxes. The official code itself differs
# by as much between float32 and float64 (the noise of a model grows with its refinements); a wrong
# detail shows as a mean difference of 1e-2 to 1.
MODELS = {
    "detr_r50_panoptic": ("../COCO-PanopticSegmentation/detr_R_50", 1e-4, 1e-5),
    "detr_r50": ("detr_R_50_500ep", 1e-4, 1e-5),
    "detr_r50_dc5": ("detr_R_50_DC5_500ep", 1e-4, 1e-5),
    "detr_r101": ("detr_R_101_500ep", 1e-4, 1e-5),
    "conditional_detr_r50": ("conditional_detr_R_50_50ep", 3e-4, 1e-5),
    "dab_detr_r50": ("dab_detr_R_50_50ep", 3e-3, 1e-4),
    "dn_dab_detr_r50": ("dn_detr_R_50_50ep", 3e-3, 1e-4),
    "deformable_detr_r50": ("deformable_detr_R_50_50ep", 1e-4, 1e-5),
    "deformable_detr_r50_refine": ("deformable_detr_refine_R_50_50ep", 1e-3, 3e-5),
    "deformable_detr_r50_two_stage": ("deformable_detr_two_stage_R_50_50ep", 3e-3, 1e-4),
    "dino_4scale_r50": ("dino_4scale_R_50_12ep", 6e-3, 2e-4),
}
# What the official loss dictionaries call proposals. Theirs are not weighted.
PROPOSALS = {"deformable_detr_r50_two_stage": "_enc", "dino_4scale_r50": "_interm"}


@pytest.fixture(scope="module", params=MODELS)
def official(request, tmp_path_factory):
    """(name, model with the rule-made weights loaded as an official checkpoint, numbers)"""
    numbers = np.load(FOLDER / f"{request.param}.npz")
    aliases = json.loads(str(numbers["aliases"])) if "aliases" in numbers else {}
    state_dict = make_state_dict(json.loads(str(numbers["listing"])), aliases)
    total = sum(t.double().sum().item() for name, t in state_dict.items() if name not in aliases)
    assert total == pytest.approx(float(numbers["weights_sum"]), rel=1e-8)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save({"model": state_dict}, path)

    cfg = get_detr_cfg()
    cfg.merge_from_file(str(CONFIGS / "COCO-Detection" / f"{MODELS[request.param][0]}.yaml"))
    num_classes = 250 if request.param == "detr_r50_panoptic" else 91
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", num_classes])
    cfg.merge_from_list(["MODEL.PIXEL_MEAN", [0.0] * 3, "MODEL.PIXEL_STD", [1.0] * 3])
    model = build_model(cfg).eval()
    report, _ = load_weights(model, str(path))
    path.unlink()
    assert report.exact
    return request.param, model, numbers


@pytest.mark.parametrize("batch", BATCHES)
def test_official_numbers(official, batch):
    name, model, numbers = official
    inputs = [make_input(index) for index in BATCHES[batch]]
    with torch.no_grad():
        predictions = model.predict_all(inputs)
        targets = model.prepare_targets(inputs)
        losses = model.criterion(predictions, targets)
        (assignment,) = model.criterion.matcher(predictions.layers[-1:], [targets])

    assert len(predictions.layers) == 6
    assert_close(name, predictions.layers[-1], numbers, batch)
    if f"{batch}.aux.pred_logits" in numbers:
        assert_close(name, predictions.layers[-2], numbers, f"{batch}.aux")

    for image in range(len(inputs)):
        here = assignment.images == image
        np.testing.assert_array_equal(
            assignment.queries[here], numbers[f"{batch}.match.{image}.src"]
        )
        np.testing.assert_array_equal(
            assignment.objects[here], numbers[f"{batch}.match.{image}.tgt"]
        )

    expected = dict(
        zip(numbers[f"{batch}.loss_names"], numbers[f"{batch}.loss_values"], strict=True)
    )
    criterion = model.criterion
    weights = {
        "loss_ce": criterion.class_weight,
        "loss_bbox": criterion.l1_weight,
        "loss_giou": criterion.giou_weight,
    }
    has_masks = predictions.masks is not None
    if has_masks:
        assert_close_masks(predictions.masks, len(inputs), numbers, batch)
        weights |= {"loss_mask": 1.0, "loss_dice": 1.0}
    assert len(losses) == 18 + 3 * (name in PROPOSALS) + 2 * has_masks
    for key, loss in losses.items():
        weight = weights["_".join(key.split("_")[:2])]
        theirs = expected[key.replace("_enc", PROPOSALS.get(name, ""))]
        assert loss.item() / weight == pytest.approx(theirs, rel=1e-4), key
    assert sum(losses.values()).item() == pytest.approx(float(numbers[f"{batch}.total"]), rel=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_official_detections(official, batch):
    _, model, numbers = official
    with torch.no_grad():
        results = model([make_input(index) for index in BATCHES[batch]])
    for index, result in enumerate(results):
        instances = result["instances"]
        boxes = torch.from_numpy(numbers[f"{batch}.post.boxes"][index])
        # detectron2 clips to the image and leaves out what is then empty.
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, 640)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, 480)
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        scores = torch.from_numpy(numbers[f"{batch}.post.scores"][index])[kept]
        assert instances.image_size == (480, 640)
        torch.testing.assert_close(
            instances.scores, scores.sort(descending=True).values, rtol=0, atol=1e-3
        )
        # Neighbours in score may swap, so each official detection is looked up: a class and a box.
        labels = torch.from_numpy(numbers[f"{batch}.post.labels"][index].astype(np.int64))[kept]
        distance = torch.cdist(boxes[kept], instances.pred_boxes.tensor, p=float("inf"))
        distance += 1e3 * (labels[:, None] != instances.pred_classes)
        assert (distance.min(1).values < 0.1).float().mean() > 0.99


def assert_close_masks(masks_of, batch_size, numbers, batch):
    """Every fourth query and pixel is stored, and the mean of all pixels."""
    sub, means = numbers[f"{batch}.pred_masks_sub"], numbers[f"{batch}.pred_masks_mean"]
    for image in range(batch_size):
        queries = torch.arange(100)
        with torch.no_grad():
            masks = masks_of(torch.full_like(queries, image), queries).numpy()
        # A is stored in half precision.
        assert np.abs(masks[::4, ::4, ::4] - sub[image]).max() < (2e-3 if batch == "A" else 1e-4)
        assert np.abs(masks.mean((1, 2)) - means[image]).max() < 1e-4


def assert_close(name, output, numbers, prefix):
    for ours, theirs, tolerance in zip(
        output, ("pred_logits", "pred_boxes"), MODELS[name][1:], strict=True
    ):
        expected = numbers[f"{prefix}.{theirs}"]
        # Of many queries, the logits of the first are stored.
        difference = np.abs(ours[:, : expected.shape[1]].numpy() - expected)
        assert difference.shape == expected.shape
        assert difference.max() < tolerance, (theirs, difference.max())
        assert difference.mean() < min(tolerance / 3, 1e-4), (theirs, difference.mean())
