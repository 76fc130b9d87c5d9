"""Encoder and decoder against PyTorch's, and what must change nothing."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from detr_d2.modeling import build_parts, build_transformer
from detr_d2.modeling.transformer import Decoder, Transformer
from detr_d2.structures import Memory, Predictions, Proposals, Queries

from .helpers import tiny_cfg
from .test_attention import random_biases, torch_attention

C = 32


def make_transformer(*options, seed=0):
    torch.manual_seed(seed)
    return random_biases(build_parts(tiny_cfg(*options))["transformer"]).eval()


def make_memory(lengths, tokens=None, seed=0):
    """Images with `lengths` unpadded tokens each, padded to `tokens`. Image and position depend on
    the index of the image and of the token alone; padding holds large random values."""
    tokens = tokens or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    content = 100 * torch.randn(len(lengths), tokens, C)
    positions = 100 * torch.randn(len(lengths), tokens, C)
    padding = torch.ones(len(lengths), tokens, dtype=torch.bool)
    for image, length in enumerate(lengths):
        content[image, :length] = torch.randn(length, C, generator=generator)
        positions[image, :length] = torch.randn(length, C, generator=generator)
        padding[image, :length] = False
    return Memory(
        tokens=content,
        positions=positions,
        padding=padding,
        level_shapes=((1, tokens),),
        valid_ratios=torch.tensor([[[length / tokens, 1.0]] for length in lengths]),
    )


def without_positions(memory):
    return replace(memory, positions=torch.zeros_like(memory.positions))


def assert_equal_outputs(actual, expected, tolerance=1e-5):
    actual, expected = (
        each.layers if isinstance(each, Predictions) else each for each in (actual, expected)
    )
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=tolerance)


def torch_layer(layer, kind):
    """PyTorch's layer with the same weights; zero positions make both the same function."""
    theirs = kind(C, 4, dim_feedforward=64, batch_first=True, norm_first=layer.pre_norm).eval()
    theirs.self_attn = torch_attention(layer.self_attn)
    theirs.linear1, theirs.linear2 = layer.ffn.linear1, layer.ffn.linear2
    theirs.norm1 = layer.self_attn_norm
    if kind is nn.TransformerDecoderLayer:
        theirs.multihead_attn = torch_attention(layer.cross_attn)
        theirs.norm2, theirs.norm3 = layer.cross_attn_norm, layer.ffn_norm
    else:
        theirs.norm2 = layer.ffn_norm
    return theirs


def randomise_norms(module):
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            nn.init.uniform_(child.weight, 0.5, 1.5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_is_pytorchs(pre_norm):
    encoder = make_transformer("MODEL.DETR.PRE_NORM", pre_norm).encoder
    randomise_norms(encoder)
    memory = without_positions(make_memory([6, 4]))
    expected = memory.tokens
    for layer in encoder.layers:
        theirs = torch_layer(layer, nn.TransformerEncoderLayer)
        expected = theirs(expected, src_key_padding_mask=memory.padding)
    assert (encoder.norm is not None) == pre_norm
    if pre_norm:
        expected = encoder.norm(expected)
    actual = encoder(memory).tokens
    valid = ~memory.padding
    torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_is_pytorchs(pre_norm):
    decoder = make_transformer("MODEL.DETR.PRE_NORM", pre_norm).decoder
    randomise_norms(decoder)
    memory = without_positions(make_memory([6, 4]))
    content = torch.randn(2, 7, C)
    outputs, _ = decoder(Queries(content, position=torch.zeros_like(content)), memory)
    expected = content
    for layer, output in zip(decoder.layers, outputs, strict=True):
        theirs = torch_layer(layer, nn.TransformerDecoderLayer)
        expected = theirs(expected, memory.tokens, memory_key_padding_mask=memory.padding)
        logits, boxes = decoder.heads[0](decoder.norm(expected))
        torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.boxes, boxes, rtol=1e-4, atol=1e-5)


def test_queries_may_be_kept_from_each_other():
    """A query that no other may see changes nobody's output."""
    decoder = make_transformer().decoder
    memory = make_memory([6])
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[:, :-1, -1] = True
    content, position = torch.randn(1, 7, C), torch.randn(1, 7, C)
    other = content.clone()
    other[:, -1] += 1
    before = decoder(Queries(content, position, attention_mask=mask), memory)[0][-1]
    after = decoder(Queries(other, position, attention_mask=mask), memory)[0][-1]
    unmasked = decoder(Queries(other, position), memory)[0][-1]
    torch.testing.assert_close(before.logits[:, :-1], after.logits[:, :-1])
    assert not torch.allclose(before.logits[:, -1], after.logits[:, -1], atol=1e-3)
    assert not torch.allclose(before.logits[:, :-1], unmasked.logits[:, :-1], atol=1e-4)


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(pre_norm):
    transformer = make_transformer("MODEL.DETR.PRE_NORM", pre_norm)
    assert_equal_outputs(
        transformer(make_memory([6], tokens=15)), transformer(make_memory([6], tokens=6))
    )


@torch.no_grad()
def test_batch_mates_change_nothing():
    transformer = make_transformer()
    memory = make_memory([6, 9, 3])
    together = transformer(memory)
    for image, length in enumerate((6, 9, 3)):
        alone = Memory(
            tokens=memory.tokens[image : image + 1, :length],
            positions=memory.positions[image : image + 1, :length],
            padding=memory.padding[image : image + 1, :length],
            level_shapes=((1, length),),
            valid_ratios=torch.ones(1, 1, 2),
        )
        here = [type(o)(*(t[image : image + 1] for t in o)) for o in together.layers]
        assert_equal_outputs(here, transformer(alone))
    assert not torch.allclose(
        together.layers[-1].logits[0], together.layers[-1].logits[1], atol=1e-3
    )


@torch.no_grad()
def test_positions_of_tokens_and_queries_matter():
    transformer = make_transformer()
    memory = make_memory([6])
    before = transformer(memory).layers[-1].boxes
    assert not torch.allclose(before[0, 0], before[0, 1], atol=1e-4)
    moved = transformer(replace(memory, positions=memory.positions.flip(1))).layers[-1].boxes
    assert not torch.allclose(before, moved, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_deep_supervision_changes_no_prediction(pre_norm):
    options = ("MODEL.DETR.PRE_NORM", pre_norm, "MODEL.DETR.DEEP_SUPERVISION")
    memory = make_memory([6, 4])
    with_losses = make_transformer(*options, True)(memory)
    without = make_transformer(*options, False)(memory)
    assert len(with_losses.layers) == 3
    assert_equal_outputs(with_losses, without, tolerance=0)


@torch.no_grad()
def test_intermediate_outputs_are_those_of_a_shorter_decoder():
    """A layer's output is normalised for the heads, not for the next layer."""
    transformer = make_transformer()
    memory = make_memory([6])
    outputs = transformer(memory).layers
    transformer.decoder.layers = transformer.decoder.layers[:2]
    assert_equal_outputs(transformer(memory), outputs[:2], tolerance=0)


def test_initial_values():
    torch.manual_seed(0)
    transformer = build_transformer(num_logits=6, hidden_dim=64, dim_feedforward=256)
    stack = [*transformer.encoder.layers, *transformer.decoder.layers]
    for linear in (linear for layer in stack for linear in (layer.ffn.linear1, layer.ffn.linear2)):
        bound = (6 / (64 + 256)) ** 0.5
        assert 0.98 * bound < linear.weight.abs().max() <= bound
    queries = make_transformer("MODEL.DETR.NUM_OBJECT_QUERIES", 500).queries.position.weight
    assert queries.std().item() == pytest.approx(1, abs=0.05)
    assert queries.mean().item() == pytest.approx(0, abs=0.05)


def test_learned_queries_start_without_content():
    transformer = make_transformer()
    queries, proposals = transformer.queries(make_memory([6, 4]))
    assert proposals is None
    assert queries.content.shape == (2, 7, C)
    assert not queries.content.any()
    assert torch.equal(queries.position[1], transformer.queries.position.weight)


class Initialiser(nn.Module):
    def __init__(self, queries, proposals):
        super().__init__()
        self.answer = queries, proposals

    def forward(self, memory):
        return self.answer


def test_proposals_are_handed_on():
    transformer = make_transformer()
    memory = make_memory([6])
    expected = transformer(memory)
    queries, _ = transformer.queries(memory)
    initialiser = Initialiser(queries, Proposals(expected.layers[1]))
    actual = Transformer(transformer.encoder, initialiser, transformer.decoder)(memory)
    assert expected.proposals is None
    assert actual.proposals.output is expected.layers[1]
    assert_equal_outputs(actual, expected, tolerance=0)


def test_heads_are_one_or_one_per_layer():
    decoder = make_transformer().decoder
    with pytest.raises(ValueError, match="3 decoder layers need 1 or 3 heads"):
        Decoder(list(decoder.layers), decoder.norm, [decoder.heads[0]] * 2, decoder.query_position)


def test_dropout_in_training_only():
    transformer = make_transformer("MODEL.DETR.DROPOUT", 0.5)
    memory = make_memory([6])
    assert_equal_outputs(transformer(memory), transformer(memory), tolerance=0)
    transformer.train()
    assert not torch.equal(
        transformer(memory).layers[-1].logits, transformer(memory).layers[-1].logits
    )
