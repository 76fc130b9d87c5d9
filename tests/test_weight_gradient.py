"""Weight gradients as matrix products are those of PyTorch's convolutions."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch.autograd import gradcheck

from detr_d2.modeling import weight_gradient
from detr_d2.modeling.weight_gradient import ConvolutionByProducts, weight_gradients_by_products

from .helpers import random_inputs, tiny_cfg

TIMM = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "test_resnet")
CHECKPOINTED = ("MODEL.ACTIVATION_CHECKPOINTING", ["backbone"])


@pytest.fixture
def calls(monkeypatch):
    """As on a CPU without AVX512, for all convolutions of more than one place; counts them."""
    counted = []
    backward = ConvolutionByProducts.backward
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(weight_gradient, "_FEWEST_CHANNELS", 1)
    monkeypatch.setattr(
        ConvolutionByProducts, "backward", lambda *a: counted.append(a) or backward(*a)
    )
    return counted


def random_convolution(kernel, stride, padding, dilation, dtype=torch.float32):
    place = stride, padding, dilation
    x = torch.randn(2, 3, 9, 12, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 3, *kernel, dtype=dtype), torch.randn(4, dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, bias)], place


PLACES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((2, 5), (3, 2), (0, 2), (2, 1)),
]


@pytest.mark.parametrize("place", PLACES)
def test_gradients_in_double_precision(place):
    inputs, place = random_convolution(*place, dtype=torch.float64)
    assert gradcheck(lambda *leaves: ConvolutionByProducts.apply(*leaves, *place), inputs)


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_pytorch(place):
    inputs, place = random_convolution(*place)
    ours, theirs = ConvolutionByProducts.apply(*inputs, *place), F.conv2d(*inputs, *place)
    assert torch.equal(ours, theirs)
    seed = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, seed),
        torch.autograd.grad(theirs, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("MODEL.RESNETS.NORM", "FrozenBN"),
        ("MODEL.RESNETS.NORM", "FrozenBN", *CHECKPOINTED),
        TIMM,
        (*TIMM, *CHECKPOINTED),
    ],
)
def test_a_training_step_has_the_same_gradients(options, calls, monkeypatch):
    if "MODEL.TIMM.NAME" in options:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*options)).train()
    inputs = random_inputs([(128, 160), (96, 128)], [2, 1])
    # Of the backbone and the neck: a square kernel of several places, or none.
    large = [m for m in model.modules() if getattr(m, "kernel_size", 1) not in (1, (1, 1))]
    large = [m for m in large if isinstance(m, torch.nn.Conv2d) and m.groups == 1]

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        sum(model(inputs).values()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    ours = gradients()
    assert len(calls) == sum(m.weight.requires_grad for m in large) > 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert len(calls) == sum(m.weight.requires_grad for m in large)


def test_only_what_gains_from_it(calls):
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3, requires_grad=True)
    convolve = {
        "several groups": lambda: F.conv2d(x, weight[:, :2], None, 1, 1, 1, 2),
        "one place": lambda: F.conv2d(x, weight[:, :, :1, :1], None, (1, 1), (0, 0), (1, 1), 1),
        "other types": lambda: F.conv2d(
            x.double(), weight.double(), None, (1, 1), (1, 1), (1, 1), 1
        ),
        "padding by name": lambda: F.conv2d(x, weight, None, (1, 1), "same", (1, 1), 1),
        "few channels": lambda: F.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1),
    }
    for name, function in convolve.items():
        weight_gradient._FEWEST_CHANNELS = 5 if name == "few channels" else 1
        with weight_gradients_by_products(x):
            function().sum().backward()
        assert not calls, name
    weight_gradient._FEWEST_CHANNELS = 1
    with weight_gradients_by_products(x):
        F.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1).sum().backward()
    assert len(calls) == 1


def test_mixed_precision_is_left_alone(calls):
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), weight_gradients_by_products(x):
        F.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1).sum().backward()
    assert not calls and weight.grad.dtype == torch.float32
