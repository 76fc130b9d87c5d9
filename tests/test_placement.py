"""Devices without a GPU: fake CUDA tensors have a device and a shape, but no values.

An operation on mixed devices raises, and so does whatever needs a value of a tensor on the host,
which on a GPU would make the host wait. PyTorch cannot run a backward pass on them; test_criterion
looks there for waiting, on real tensors.
"""

import pytest
import torch
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detr_d2.box_ops import generalized_box_iou
from detr_d2.modeling import Detr
from detr_d2.structures import Assignment, Predictions

from .helpers import (
    VARIANTS,
    make_criterion,
    random_inputs,
    random_outputs,
    random_targets,
    tiny_cfg,
)

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None and torch.version.hip is None,
    reason="fake CUDA tensors that need gradients need a PyTorch built for CUDA",
)

SIZES, COUNTS = [(64, 96), (80, 64)], [2, 3]


def pad_images(images, size_divisibility, padding_constraints):
    """Stands in for `ImageList.from_tensors`, which keeps image sizes in tensors on the CPU; fake
    tensors would have forgotten them."""
    assert size_divisibility == 0 and not padding_constraints
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for image, padded in zip(images, batch, strict=True):
        padded[:, : image.shape[1], : image.shape[2]].copy_(image)
    return ImageList(batch, [tuple(image.shape[1:]) for image in images])


def assign(cost, counts):
    """Stands in for scipy: object i goes to query i."""
    assert cost.device.type == "cpu"
    images = [image for image, count in enumerate(counts) for _ in range(count)]
    objects = [index for count in counts for index in range(count)]
    images, objects = torch.tensor([images, objects], dtype=torch.int64)
    return Assignment(images, objects, objects)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(ImageList, "from_tensors", staticmethod(pad_images))
    monkeypatch.setattr("detr_d2.matcher._assign", assign)
    # Boxes.clip checks that its values are finite.
    monkeypatch.setattr("detr_d2.modeling.meta_arch.detector_postprocess", lambda x, *size: x)


def fake_model(*options, variant="detr_tiny"):
    with torch.device("cuda"):
        return Detr(tiny_cfg("MODEL.DEVICE", "cuda", *options, config=variant))


def to_cuda(outputs, targets):
    outputs = [type(o)(*(t.detach().cuda().requires_grad_() for t in o)) for o in outputs]
    targets = [t._replace(classes=t.classes.cuda(), boxes=t.boxes.cuda()) for t in targets]
    return Predictions(outputs), targets


class Transfers(TorchDispatchMode):
    """Counts copies from the device to the host."""

    def __init__(self):
        super().__init__()
        self.to_host = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = args[1] if name == "copy_" else args[0] if args else None
        if name in ("copy_", "_to_copy") and source.device.type == "cuda":
            self.to_host += result.device.type == "cpu"
        return result


@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_predictions_stay_on_the_device(stand_ins, position, pre_norm):
    options = ("MODEL.DETR.POSITION_EMBEDDING", position, "MODEL.DETR.PRE_NORM", pre_norm)
    with FakeTensorMode():
        model = fake_model(*options).eval()
        assert model.device.type == "cuda"
        with Transfers() as transfers:
            outputs = model.predict(random_inputs(SIZES))
        assert [tensor.device.type for output in outputs for tensor in output] == ["cuda"] * 6
        assert transfers.to_host == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_detections_stay_on_the_device(stand_ins, variant):
    with FakeTensorMode():
        model = fake_model("TEST.DETECTIONS_PER_IMAGE", 5, variant=variant).eval()
        with Transfers() as transfers, torch.no_grad():
            results = model(random_inputs(SIZES))
        for result in results:
            instances = result["instances"]
            assert len(instances) == 5
            fields = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
            assert all(field.device.type == "cuda" for field in fields)
        assert transfers.to_host == 0


@pytest.mark.parametrize("counts", [COUNTS, [0, 3], [0, 0]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_transfers_once(stand_ins, variant, counts, monkeypatch):
    """Images and ground truth come on the CPU; the costs go back in one piece."""
    # It reads labels on the CPU, which stand-ins for tensors do not have.
    monkeypatch.setattr("detr_d2.modeling.meta_arch.check_classes", lambda *arguments: None)
    with FakeTensorMode():
        model = fake_model(variant=variant).train()
        with Transfers() as transfers:
            losses = model(random_inputs(SIZES, counts))
            assert len(losses) >= 9
            assert all(loss.device.type == "cuda" for loss in losses.values())
        assert transfers.to_host == 1


def test_the_criterion_transfers_once_whatever_the_event_storage(stand_ins):
    with FakeTensorMode(), Transfers() as transfers, EventStorage(1):
        losses = make_criterion()(*to_cuda(random_outputs(2, layers=6), random_targets(COUNTS)))
        assert len(losses) == 18
        assert transfers.to_host == 1


def test_diagnostics_are_the_known_exception(stand_ins):
    """They are numbers for the log, every `diagnostics_period` iterations."""
    with FakeTensorMode(), EventStorage(make_criterion().diagnostics_period):
        arguments = to_cuda(random_outputs(2), random_targets(COUNTS))
        with pytest.raises(DataDependentOutputException):
            make_criterion()(*arguments)


# The tests above can fail: fake tensors notice each kind of mistake.


def test_a_part_on_another_device_is_noticed(stand_ins):
    with FakeTensorMode():
        model = fake_model().eval()
        model.pixel_mean = model.pixel_mean.cpu()
        with pytest.raises(Exception, match="cuda:0, cpu|cpu, cuda:0|same device"):
            model.predict(random_inputs(SIZES))


def test_ground_truth_on_another_device_is_noticed(stand_ins):
    with FakeTensorMode():
        predictions, _ = to_cuda(random_outputs(2), [])
        with pytest.raises(Exception, match="cuda:0, cpu|cpu, cuda:0|same device"):
            make_criterion()(predictions, random_targets(COUNTS))


def test_a_look_at_a_value_is_noticed():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        boxes = torch.zeros(2, 4, device="cuda")
        generalized_box_iou(boxes, boxes).max().item()
