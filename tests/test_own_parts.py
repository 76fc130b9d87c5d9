"""Parts of another project: the README's example, and what is said when a name is wrong."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from detr_d2.errors import UserError
from detr_d2.modeling import CROSS_ATTENTION_REGISTRY, QUERIES_REGISTRY

from .helpers import random_inputs, tiny_cfg

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example():
    """Runs the README's example once: a registry takes a name but once."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "REGISTRY" in b]
    assert len(block.splitlines()) < 40
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_own_queries_and_attention_train(example):
    assert "GridQueries" in QUERIES_REGISTRY and "LinearAttention" in CROSS_ATTENTION_REGISTRY
    model = build_model(
        tiny_cfg(
            *("MODEL.DETR.QUERIES", "GridQueries", "MODEL.DETR.NUM_OBJECT_QUERIES", 9),
            *("MODEL.DETR.CROSS_ATTENTION", "LinearAttention"),
            *("MODEL.DETR.ENCODER_ATTENTION", "LinearAttention", "MODEL.DETR.BOX_HEAD", "offset"),
        )
    ).train()
    assert type(model.transformer.queries).__name__ == "GridQueries"
    attentions = [layer.cross_attn for layer in model.transformer.decoder.layers]
    attentions += [layer.self_attn for layer in model.transformer.encoder.layers]
    assert {type(attention).__name__ for attention in attentions} == {"LinearAttention"}
    losses = model(random_inputs([(64, 96), (80, 64)], [3, 1]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_own_attention_ignores_padding(example):
    model = build_model(tiny_cfg("MODEL.DETR.CROSS_ATTENTION", "LinearAttention")).eval()
    attention = model.transformer.decoder.layers[0].cross_attn
    memory = model.encode_images(random_inputs([(64, 96), (96, 64)]))
    position = type("Position", (), {"embedding": torch.zeros(2, 3, 32)})
    content = torch.randn(2, 3, 32)
    before = attention(content, position, memory)
    memory.tokens[memory.padding] = 100.0
    torch.testing.assert_close(attention(content, position, memory), before)


def test_unknown_names_list_the_registered_ones(example):
    with pytest.raises(UserError, match="'Grid'; it must be one of learned, .*top_k, GridQueries"):
        build_model(tiny_cfg("MODEL.DETR.QUERIES", "Grid"))
