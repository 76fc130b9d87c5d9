"""Whatever parts a config asks for either work together or are refused with the reason."""

import itertools
import random

import pytest
import torch
from detectron2.modeling import build_model

from detr_d2 import get_detr_cfg
from detr_d2.errors import UserError
from detr_d2.modeling.build import build_criterion, build_denoising, build_transformer
from detr_d2.modeling.combinations import CHOICES, check_combination, uses_positions

from .helpers import random_inputs, tiny_cfg

IN_NECK = ("POSITION_EMBEDDING", "NECK")  # LazyConfigs name their classes
FREE = {
    "QUERIES": CHOICES["QUERIES"],
    "QUERY_CONTENT": CHOICES["QUERY_CONTENT"],
    "QUERY_POSITION": CHOICES["QUERY_POSITION"],
    "SELF_ATTENTION": CHOICES["SELF_ATTENTION"],
    "CROSS_ATTENTION": CHOICES["CROSS_ATTENTION"],
    "ENCODER_ATTENTION": CHOICES["ENCODER_ATTENTION"],
    "BOX_HEAD": CHOICES["BOX_HEAD"],
    "REFINEMENT": CHOICES["REFINEMENT"],
    "CLASSIFICATION": CHOICES["CLASSIFICATION"],
    "DENOISING.METHOD": CHOICES["DENOISING.METHOD"],
    "SHARED_HEADS": (True, False),
    "CLASS_AGNOSTIC_PROPOSALS": (True, False),
    "SUPERVISED_PROPOSALS": CHOICES["SUPERVISED_PROPOSALS"],
}


def config(choice):
    options = [item for key, value in choice.items() for item in (f"MODEL.DETR.{key}", value)]
    return tiny_cfg(*options, config="deformable_tiny")


def is_accepted(detr, choice):
    for key, value in choice.items():
        node, _, name = key.rpartition(".")
        (detr[node] if node else detr)[name] = value
    try:
        check_combination(detr)
    except UserError as error:
        assert "do not go together" in str(error) and "MODEL.DETR." in str(error)
        return False
    return True


def accepted():
    detr = tiny_cfg(config="deformable_tiny").MODEL.DETR
    every = (dict(zip(FREE, values, strict=True)) for values in itertools.product(*FREE.values()))
    return [choice for choice in every if is_accepted(detr, choice)]


@pytest.fixture(scope="module")
def good():
    return accepted()


def test_every_choice_is_in_some_good_combination(good):
    assert 500 < len(good) < 20000
    for key, values in FREE.items():
        assert {choice[key] for choice in good} == set(values), key


@pytest.mark.parametrize("seed", range(24))
def test_good_combinations_train_and_predict(good, seed):
    """Every parameter of the transformer has a gradient: nothing stands around unused."""
    choice = random.Random(seed).choice(good)
    torch.manual_seed(seed)
    model = build_model(config(choice)).train()
    for parameter in model.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = random_inputs([(64, 96), (80, 64)], [3, 1])
    losses = model(inputs)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()), choice
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # The last layer moves no reference any more, and class-agnostic proposals have no content.
    assert not unused, (choice, unused)
    model.eval()
    with torch.no_grad():
        results = model(inputs)
    assert all(result["instances"].pred_boxes.tensor.isfinite().all() for result in results)


# Combinations that follow for free: what each is called, and what it adds to a tiny config.
NAMED = {
    "DAB-Deformable": (
        "deformable_tiny",
        {"QUERIES": "anchor", "QUERY_POSITION": "box", "REFINEMENT": "detached"},
    ),
    "DN-Deformable": (
        "deformable_tiny",
        {
            "QUERIES": "anchor",
            "QUERY_POSITION": "box",
            "REFINEMENT": "detached",
            "DENOISING.METHOD": "dn",
        },
    ),
    "two-stage with plain attention": (
        "dino_tiny",
        {"ENCODER_ATTENTION": "plain", "CROSS_ATTENTION": "plain"},
    ),
    "top-k queries with conditional attention": (
        "fast_tiny",
        {"CROSS_ATTENTION": "conditional", "QUERY_POSITION": "modulated"},
    ),
    "look forward twice from points": ("deformable_tiny", {"REFINEMENT": "look_forward_twice"}),
    "look forward twice in Deformable DETR": (
        "deformable_two_stage_tiny",
        {"REFINEMENT": "look_forward_twice"},
    ),
    "five scales": ("dino_tiny", {"NUM_FEATURE_LEVELS": 5}),
    "all scales with plain attention": (
        "fast_tiny",
        {"NECK": "multi_scale", "NUM_FEATURE_LEVELS": 2, "CROSS_ATTENTION": "plain"},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_combinations_that_follow_for_free(name):
    variant, choice = NAMED[name]
    options = [item for key, value in choice.items() for item in (f"MODEL.DETR.{key}", value)]
    model = build_model(tiny_cfg(*options, config=variant)).train()
    losses = model(random_inputs([(64, 96), (80, 64)], [3, 1]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (
            {"QUERIES": "learned", "QUERY_CONTENT": "zero", "BOX_HEAD": "absolute"},
            "CROSS_ATTENTION deformable looks about a reference",
        ),
        ({"QUERY_CONTENT": "memory"}, "it needs QUERIES top_k"),
        ({"QUERY_POSITION": "box"}, "made from boxes: it needs QUERIES anchor or top_k"),
        ({"QUERY_POSITION": "conditional"}, "makes a place for CROSS_ATTENTION conditional only"),
        ({"CROSS_ATTENTION": "conditional"}, "it needs QUERY_POSITION conditional or modulated"),
        ({"BOX_HEAD": "absolute"}, "ignores the references of QUERIES point"),
        ({"DENOISING.METHOD": "dn"}, "makes queries from boxes alone"),
        ({"CLASS_AGNOSTIC_PROPOSALS": True}, "others propose nothing"),
        ({"SUPERVISED_PROPOSALS": "all"}, "SUPERVISED_PROPOSALS is for QUERIES top_k"),
        ({"SHARED_HEADS": False, "DEEP_SUPERVISION": False}, "without a loss"),
        ({"ENCODER_POSITION_SCALE": True, "ENC_LAYERS": 0}, "needs encoder layers"),
        (
            {"QUERIES": "top_k", "QUERY_CONTENT": "position", "CLASSIFICATION": "softmax"},
            "it needs CLASSIFICATION sigmoid",
        ),
        ({"QUERIES": "top_k", "QUERY_CONTENT": "zero"}, "needs QUERY_CONTENT learned, memory"),
    ],
)
def test_reasons(choice, reason):
    with pytest.raises(UserError, match=f"do not go together.*{reason}"):
        build_model(config(choice))


def test_unknown_parts_are_named():
    with pytest.raises(UserError, match="QUERIES .*is 'anchors'; it must be one of learned, point"):
        build_model(config({"QUERIES": "anchors"}))


@pytest.mark.parametrize("key", [key for key in CHOICES if key not in IN_NECK])
def test_unknown_parts_are_named_in_lazy_configs(key):
    """Which call these functions without a yaml's check of all keys."""
    argument = key.rpartition(".")[2].lower()
    build, others = build_transformer, {"num_logits": 3}
    if key == "CLASSIFICATION":
        build, others = build_criterion, {"num_classes": 3}
    elif key == "DENOISING.METHOD":
        build, others = build_denoising, {"num_classes": 3, "hidden_dim": 8}
    with pytest.raises(UserError, match=f"LazyConfig: {argument}. is 'plane'; it must be one of"):
        build(**others, **{argument: "plane"})


@pytest.mark.parametrize(
    ("layers", "attention", "queries", "used"),
    [
        (0, "deformable", "top_k", False),
        (1, "deformable", "top_k", True),
        (0, "conditional", "top_k", True),
        (0, "deformable", "of one's own", True),
    ],
)
def test_who_looks_at_positions(layers, attention, queries, used):
    detr = get_detr_cfg().MODEL.DETR
    detr.ENC_LAYERS, detr.CROSS_ATTENTION, detr.QUERIES = layers, attention, queries
    assert uses_positions(detr) == used
