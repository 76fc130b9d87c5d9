"""Weight gradients as matrix products are those of PyTorch's convolutions."""

from contextlib import nullcontext
from types import SimpleNamespace

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
    """As on a CPU with AVX2, for all 3x3 convolutions in channels last; counts backward passes."""
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
        if a.shape == inputs[0].shape:  # the next convolution's gradients are fast in it, too
            assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_nothing_is_computed_that_nobody_needs(needed):
    """Below the first stage that learns, for one, there is no gradient of inputs."""
    (x, weight, _), place = random_convolution(*PLACES[0])
    ctx = SimpleNamespace(saved_tensors=(x, weight), place=place, needs_input_grad=needed)
    gradients = ConvolutionByProducts.backward(ctx, torch.ones(2, 4, 9, 12))
    assert [g is not None for g in gradients] == [*needed, False, False, False]


def test_functional_gradients_of_each_image():
    (x, weight, _), place = random_convolution(*PLACES[1])

    def gradients(convolve):
        each = torch.func.grad(lambda w, x: convolve(x[None], w, None, *place).square().sum())
        return torch.func.vmap(each, in_dims=(None, 0))(weight.detach(), x.detach())

    ours, theirs = gradients(ConvolutionByProducts.apply), gradients(F.conv2d)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


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
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    large = [m for m in convolutions if m.kernel_size == (3, 3) and m.weight.requires_grad]

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        sum(model(inputs).values()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    ours = gradients()
    assert len(calls) == len(large) > 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert len(calls) == len(large)


def convolution(**changes):
    """Arguments of one that gains from it, but for what is changed."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    values = (x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    return list({**dict(zip(names, values, strict=True)), **changes}.values())


class Doubled(torch.Tensor):
    """Weights whose convolutions are twice as large."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is F.conv2d else result


OTHERS = {
    "several groups": lambda: {"weight": torch.randn(8, 2, 3, 3, requires_grad=True), "groups": 2},
    "one place": lambda: {"weight": torch.randn(8, 4, 1, 1, requires_grad=True)},
    "few channels": lambda: (
        {"weight": torch.randn(8, 3, 3, 3, requires_grad=True)}
        | {"input": torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)}
    ),
    "frozen": lambda: {"weight": torch.randn(8, 4, 3, 3)},
    "another type": lambda: (
        {"weight": torch.randn(8, 4, 3, 3, requires_grad=True).double()}
        | {"input": torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).double()}
    ),
    "another layout": lambda: {"input": torch.randn(2, 4, 8, 8)},
    "no batch": lambda: {"input": torch.randn(4, 8, 8)},
    "padding by name": lambda: {"padding": "same"},
    "numbers": lambda: {"stride": 1, "padding": 1, "dilation": 1},
    "one number": lambda: {"stride": (1,), "padding": (1,), "dilation": (1,)},
    "a subclass": lambda: {"weight": Doubled(torch.randn(8, 4, 3, 3)).requires_grad_()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_pytorchs(name, calls, monkeypatch):
    monkeypatch.setattr(weight_gradient, "_FEWEST_CHANNELS", 4)
    arguments = convolution(**OTHERS[name]())
    leaves = [t for t in arguments[:2] if t.requires_grad] or [arguments[0].requires_grad_()]
    gradients = []
    for context in (nullcontext(), weight_gradients_by_products(arguments[0])):
        with context:
            total = F.conv2d(*arguments).square().sum()
        gradients.append(torch.autograd.grad(total, leaves))
    assert not calls
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_precision_is_left_alone(calls):
    """Wherever it begins."""
    arguments = convolution()
    with torch.autocast("cpu", torch.bfloat16), weight_gradients_by_products(arguments[0]):
        F.conv2d(*arguments).sum().backward()
    with weight_gradients_by_products(arguments[0]), torch.autocast("cpu", torch.bfloat16):
        F.conv2d(*arguments).sum().backward()
    assert not calls
    with weight_gradients_by_products(arguments[0]):
        F.conv2d(*arguments).sum().backward()
    assert len(calls) == 1


def test_what_is_compiled_is_left_alone(calls):
    module = torch.nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = convolution()[0]
    expected = torch.autograd.grad(module(x).square().sum(), module.weight)
    compiled = torch.compile(module, backend="aot_eager")
    with weight_gradients_by_products(x):
        actual = torch.autograd.grad(compiled(x).square().sum(), module.weight)
    assert not calls
    torch.testing.assert_close(actual, expected)


def test_only_for_gradients_on_cpus_that_gain(calls, monkeypatch):
    x = torch.zeros(1, 4, 8, 8)
    assert not isinstance(weight_gradients_by_products(x), nullcontext)
    assert isinstance(weight_gradients_by_products(x.to("meta")), nullcontext)
    with torch.no_grad():
        assert isinstance(weight_gradients_by_products(x), nullcontext)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert isinstance(weight_gradients_by_products(x), nullcontext)
