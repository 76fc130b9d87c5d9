"""Query initialisers and the query positions that are made from them, by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from detr_d2.box_ops import inverse_sigmoid
from detr_d2.modeling import build_transformer
from detr_d2.modeling.heads import PredictionHead
from detr_d2.modeling.position import sine_embedding
from detr_d2.modeling.queries import AnchorQueries, PointQueries, TopKQueries
from detr_d2.modeling.query_position import (
    BoxQueryPosition,
    ConditionalQueryPosition,
    ModulatedQueryPosition,
    StaticQueryPosition,
)
from detr_d2.structures import Memory, Queries

C, Q, K = 8, 3, 4
SHAPES = ((4, 6), (2, 3))


def make_memory(seed=0):
    """The second image's right half is padding."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, :24] = (torch.arange(6) >= 3).repeat(4)
    padding[1, 24:] = (torch.arange(3) >= 2).repeat(2)
    return Memory(
        tokens=torch.randn(2, 30, C, generator=generator),
        positions=torch.zeros(2, 30, C),
        padding=padding,
        level_shapes=SHAPES,
        valid_ratios=torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.5, 1.0], [2 / 3, 1.0]]]),
    )


def top_k(content="memory", class_agnostic=False, supervise_all=False, num_queries=Q):
    torch.manual_seed(0)
    head = PredictionHead(C, K, is_offset=True)
    nn.init.normal_(head.box_head.layers[-1].weight)
    return TopKQueries(num_queries, C, head, content, class_agnostic, supervise_all)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_points(learned, layers):
    torch.manual_seed(0)
    initialiser = PointQueries(Q, C, learned_content=learned, reference_layers=layers)
    queries, proposals = initialiser(make_memory())
    assert proposals is None
    point = initialiser.reference_head(initialiser.position.weight).sigmoid()
    torch.testing.assert_close(queries.reference, point.expand(2, -1, -1))
    assert torch.equal(queries.position[1], initialiser.position.weight)
    expected = initialiser.content.weight if learned else torch.zeros(Q, C)
    assert torch.equal(queries.content[1], expected)


def test_anchors():
    torch.manual_seed(0)
    queries, proposals = AnchorQueries(Q, C, learned_content=False)(make_memory())
    assert proposals is None and queries.position is None
    assert queries.reference.shape == (2, Q, 4) and not queries.content.any()
    assert ((queries.reference > 0) & (queries.reference < 1)).all()


@torch.no_grad()
def test_cells_by_hand():
    """Boxes of 0.05 and 0.1 of the image about each cell's middle; of the second image only the
    left half exists, and what would leave it proposes nothing."""
    logits, unusable = top_k()._cells(make_memory())
    boxes = logits.sigmoid()
    expected = torch.tensor([2.5 / 6, 1.5 / 4, 0.05, 0.05])
    torch.testing.assert_close(boxes[0, 6 + 2], expected)
    expected = torch.tensor([2.5 / 6 / 0.5, 1.5 / 4, 0.05, 0.05])
    torch.testing.assert_close(boxes[1, 6 + 2], expected)
    torch.testing.assert_close(boxes[0, 24], torch.tensor([0.5 / 3, 0.25, 0.1, 0.1]))
    assert not unusable[0].any()
    assert torch.equal(unusable[1], make_memory().padding[1])


@torch.no_grad()
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("supervise_all", [False, True])
def test_the_best_tokens_are_chosen(class_agnostic, supervise_all):
    initialiser, memory = top_k("memory", class_agnostic, supervise_all), make_memory()
    queries, proposals = initialiser(memory)
    cells, unusable = initialiser._cells(memory)
    tokens = memory.tokens.clone()
    tokens[unusable] = 0
    tokens = initialiser.memory_norm(initialiser.memory_proj(tokens))
    logits = initialiser.head.class_head(tokens)
    scores = logits[..., 0] if class_agnostic else logits.amax(-1)
    boxes = (initialiser.head.box_head(tokens) + cells).sigmoid()
    for image in range(2):
        best = scores[image].argsort(descending=True)[:Q]
        torch.testing.assert_close(queries.reference[image], boxes[image, best])
        torch.testing.assert_close(queries.content[image], tokens[image, best])
        if not supervise_all:
            torch.testing.assert_close(proposals.output.logits[image], logits[image, best])
    if supervise_all:
        torch.testing.assert_close(proposals.output.logits, logits)
        torch.testing.assert_close(proposals.output.boxes, boxes)
    assert proposals.class_agnostic == class_agnostic


def test_gradients_reach_the_proposals_only_through_their_losses():
    initialiser, memory = top_k(), make_memory()
    memory = replace(memory, tokens=memory.tokens.requires_grad_())
    queries, proposals = initialiser(memory)
    assert not queries.reference.requires_grad and not queries.content.requires_grad
    assert proposals.output.boxes.requires_grad and proposals.output.logits.requires_grad


@torch.no_grad()
def test_contents_of_chosen_tokens():
    memory = make_memory()
    learned = top_k("learned")
    queries, _ = learned(memory)
    assert torch.equal(queries.content[1], learned.content.weight) and queries.position is None

    position = top_k("position")
    queries, _ = position(memory)
    waves = sine_embedding(queries.reference, C // 2)  # x, y, w, h
    both = position.position_norm(position.position_proj(waves))
    torch.testing.assert_close(queries.position, both[..., :C])
    torch.testing.assert_close(queries.content, both[..., C:])


@torch.no_grad()
def test_fewer_tokens_than_queries():
    queries, proposals = top_k("learned", num_queries=50)(make_memory())
    assert queries.content.shape == (2, 30, C) and proposals.output.boxes.shape == (2, 30, 4)


# ---------------------------------------------------------------------------- query positions


def make_queries(numbers):
    torch.manual_seed(1)
    return Queries(torch.randn(2, Q, C), torch.randn(2, Q, C), torch.rand(2, Q, numbers))


def wave(value, channels):
    """sin and cos of 2 pi value / 10000^(2i / channels), interleaved."""
    result = []
    for i in range(channels // 2):
        angle = torch.tensor(2 * torch.pi * value / 10000 ** (2 * i / channels))
        result += [angle.sin(), angle.cos()]
    return torch.stack(result)


def test_static():
    queries = make_queries(2)
    position = StaticQueryPosition()(queries, queries.content, None, make_memory(), False)
    assert position.embedding is queries.position and position.spatial is None


@torch.no_grad()
@pytest.mark.parametrize("numbers", [2, 4])
def test_conditional(numbers):
    """(y, x) of the reference, from the second layer on times what the content says."""
    part, queries = ConditionalQueryPosition(C), make_queries(numbers)
    memory, reference = make_memory(), queries.reference
    first = part(queries, queries.content, reference, memory, True)
    x, y = reference[1, 2, :2].tolist()
    torch.testing.assert_close(first.spatial[1, 2], torch.cat((wave(y, C // 2), wave(x, C // 2))))
    assert first.embedding is queries.position
    second = part(queries, queries.content, reference, memory, False)
    torch.testing.assert_close(second.spatial, first.spatial * part.scale(queries.content))


@torch.no_grad()
def test_modulated():
    """y's half is multiplied by the content's height over the box's, x's by that of the width."""
    part, queries = ModulatedQueryPosition(C), make_queries(4)
    reference = queries.reference
    first = part(queries, queries.content, reference, make_memory(), True)
    x, y, w, h = reference[1, 2].tolist()
    waves = torch.cat([wave(value, C // 2) for value in (y, x, w, h)])
    torch.testing.assert_close(first.embedding[1, 2], part.box_mlp(waves))
    width, height = part.size_mlp(queries.content[1, 2]).sigmoid()
    expected = torch.cat((waves[: C // 2] * height / h, waves[C // 2 : C] * width / w))
    torch.testing.assert_close(first.spatial[1, 2], expected)
    second = part(queries, queries.content, reference, make_memory(), False)
    torch.testing.assert_close(second.spatial, first.spatial * part.scale(queries.content))


@torch.no_grad()
def test_box():
    part, queries = BoxQueryPosition(C), make_queries(4)
    reference, memory = queries.reference, make_memory()
    position = part(queries, queries.content, reference, memory, False)
    x, y, w, h = reference[1, 2].tolist()
    waves = torch.cat([wave(value, C // 2) for value in (y, x, w, h)])
    torch.testing.assert_close(position.embedding[1, 2], part.box_mlp(waves))
    padded = BoxQueryPosition(C, relative_to_padding=True)
    padded.load_state_dict(part.state_dict())
    position = padded(queries, queries.content, reference, memory, False)
    waves = torch.cat([wave(value, C // 2) for value in (y, x * 0.5, w * 0.5, h)])
    torch.testing.assert_close(position.embedding[1, 2], part.box_mlp(waves))


def test_inverse_sigmoid():
    x = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    expected = torch.tensor([1e-3, 0.25 / 0.75, 1e3], dtype=torch.float64).log()
    torch.testing.assert_close(inverse_sigmoid(x, 1e-3), expected)


# ------------------------------------------------------------------------------------- heads


@torch.no_grad()
def test_offsets_from_points_and_boxes():
    """In logits: of a point only the centre is known, of a box all four numbers."""
    torch.manual_seed(0)
    head = PredictionHead(C, K, is_offset=True)
    nn.init.normal_(head.box_head.layers[-1].weight)
    content, box = torch.randn(1, 2, C), torch.rand(1, 2, 4)
    offset = head.box_head(content)
    from_box = (offset + torch.logit(box)).sigmoid()
    torch.testing.assert_close(head(content, box).boxes, from_box, rtol=1e-4, atol=1e-5)
    from_point = torch.cat((from_box[..., :2], offset[..., 2:].sigmoid()), dim=-1)
    torch.testing.assert_close(head(content, box[..., :2]).boxes, from_point, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_initial_predictions_are_the_references_with_the_prior_probability():
    head = PredictionHead(C, K, is_offset=True, prior_probability=0.01, initial_size_logit=-2.0)
    nn.init.zeros_(head.class_head.weight)
    output = head(torch.randn(1, 2, C), torch.tensor([[[0.3, 0.6], [0.5, 0.2]]]))
    torch.testing.assert_close(output.logits.sigmoid(), torch.full((1, 2, K), 0.01))
    torch.testing.assert_close(output.boxes[0, 0, :2], torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(output.boxes[0, 0, 2:].logit(), torch.full((2,), -2.0))


@pytest.mark.parametrize("shared", [True, False])
def test_only_the_first_of_refining_heads_starts_from_points(shared):
    """A shared head would add its start again in every layer."""
    transformer = build_transformer(
        num_logits=3,
        num_queries=5,
        hidden_dim=32,
        num_heads=4,
        queries="point",
        box_head="offset",
        cross_attention="deformable",
        refinement="detached",
        shared_heads=shared,
        num_decoder_layers=3,
        num_encoder_layers=1,
    )
    sizes = [h.box_head.layers[-1].bias[2:].tolist() for h in transformer.decoder.heads]
    assert sizes == ([[0, 0]] if shared else [[-2, -2], [0, 0], [0, 0]])


@torch.no_grad()
def test_cells_at_the_edge_of_a_wide_map_propose_nothing():
    """Of 60 columns the first has its centre at 1/120, less than 0.01."""
    shapes, padding = ((1, 60),), torch.zeros(1, 60, dtype=torch.bool)
    memory = Memory(
        torch.randn(1, 60, C), torch.zeros(1, 60, C), padding, shapes, torch.ones(1, 1, 2)
    )
    logits, unusable = top_k()._cells(memory)
    assert unusable[0].nonzero().flatten().tolist() == [0, 59]
    assert logits[0, [0, 59]].isinf().all() and logits[0, 1:59].isfinite().all()


def refining_decoder(refinement):
    torch.manual_seed(0)
    transformer = build_transformer(
        num_logits=3,
        num_queries=5,
        hidden_dim=32,
        num_heads=4,
        queries="anchor",
        query_position="box",
        box_head="offset",
        refinement=refinement,
        shared_heads=False,
        num_decoder_layers=3,
        num_encoder_layers=1,
        dropout=0.0,
    )
    for head in transformer.decoder.heads:
        nn.init.normal_(head.box_head.layers[-1].weight, std=0.1)
    return transformer


@pytest.mark.parametrize("refinement", ["detached", "look_forward_twice"])
def test_what_a_layers_boxes_teach_the_layer_before(refinement):
    """Deformable DETR: nothing. DINO: the boxes that it starts from, but not where the next layer
    looks, and nothing two layers back."""
    transformer = refining_decoder(refinement)
    tokens = torch.randn(2, 30, 32)
    memory = replace(make_memory(), tokens=tokens, positions=torch.zeros_like(tokens))
    layers = transformer(memory).layers
    assert len(layers) == 3
    heads = [head.box_head.layers[-1].bias for head in transformer.decoder.heads]
    gradients = torch.autograd.grad(
        layers[2].boxes.sum(), heads, allow_unused=True, materialize_grads=True
    )
    reach = [bool(gradient.any()) for gradient in gradients]
    assert reach == [False, refinement == "look_forward_twice", True]


@torch.no_grad()
def test_boxes_without_a_size_have_a_finite_position():
    part, queries = ModulatedQueryPosition(C), make_queries(4)
    reference = queries.reference.clone()
    reference[..., 2:] = 0
    position = part(queries, queries.content, reference, make_memory(), True)
    assert position.spatial.isfinite().all() and position.embedding.isfinite().all()


@torch.no_grad()
def test_layers_that_norm_before_refine_from_what_is_normed():
    decoder = refining_decoder("detached").decoder
    content, reference = 50 * torch.randn(1, 5, 32), torch.rand(1, 5, 4)
    head = decoder.heads[0]
    assert torch.equal(decoder._refine(head, content, reference), head.boxes(content, reference))
    decoder.layers[0].pre_norm = True
    expected = head.boxes(decoder.norm(content), reference)
    assert torch.equal(decoder._refine(head, content, reference), expected)
