"""Denoising queries: their noise, what they may see, and what they change."""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from detr_d2.box_ops import cxcywh_to_xyxy
from detr_d2.modeling.denoising import ContrastiveDenoising, Denoising
from detr_d2.structures import LayerOutput, Predictions, Queries, Target

from .helpers import NUM_CLASSES, random_inputs, random_targets, tiny_cfg

C, Q = 16, 5


def make_queries(batch):
    generator = torch.Generator().manual_seed(0)
    return Queries(
        content=torch.randn(batch, Q, C, generator=generator),
        reference=torch.rand(batch, Q, 4, generator=generator),
    )


def make(method, **options):
    torch.manual_seed(0)
    return {"dn": Denoising, "contrastive": ContrastiveDenoising}[method](NUM_CLASSES, C, **options)


METHODS = ["dn", "contrastive"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("counts", [[3, 1], [2, 0], [0, 0]])
def test_shapes(method, counts):
    """dn: 5 groups; contrastive: as many as 12 positives of the fullest image make."""
    options = {"num_groups": 5} if method == "dn" else {"num_queries": 12}
    queries = make(method, **options)(make_queries(2), random_targets(counts))
    groups = 5 if method == "dn" else 12 // max(*counts, 1)
    size = max(counts) * (1 if method == "dn" else 2)
    noised = queries.denoising
    assert noised.num_groups == groups
    assert queries.content.shape == (2, groups * size + Q, C)
    assert queries.reference.shape == (2, groups * size + Q, 4)
    assert ((queries.reference >= 0) & (queries.reference <= 1)).all()
    assert queries.attention_mask.shape == (2, groups * size + Q, groups * size + Q)
    copies = 1 if method == "dn" else 2
    assert noised.valid.sum(1).tolist() == [groups * copies * count for count in counts]


@pytest.mark.parametrize("method", METHODS)
def test_assignment(method):
    """Every object belongs to one query of every group, in the order of the ground truth."""
    counts = [3, 1]
    options = {"num_groups": 2} if method == "dn" else {"num_queries": 6}
    assignment = make(method, **options)(make_queries(2), random_targets(counts)).denoising
    size = 3 if method == "dn" else 6
    expected = [(0, g * size + t, t) for g in range(2) for t in range(3)]
    expected += [(1, g * size, 0) for g in range(2)]
    assert list(zip(*(t.tolist() for t in assignment.assignment), strict=True)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_queries_are_the_ground_truth(method):
    targets = random_targets([3, 2])
    denoising = make(method, label_noise=0.0, box_noise=0.0)
    queries = denoising(make_queries(2), targets)
    images, places, objects = queries.denoising.assignment
    for image, place, index in zip(images, places, objects, strict=True):
        torch.testing.assert_close(queries.reference[image, place], targets[image].boxes[index])
        label = denoising.label_embedding.weight[targets[image].classes[index]]
        torch.testing.assert_close(queries.content[image, place, : len(label)], label)


def test_dn_box_noise_stays_in_its_bounds():
    """The centre moves by at most 0.4 half sizes, the size changes by at most 0.4 of itself."""
    box = torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    targets = [Target(torch.tensor([1]), box)]
    denoising = make("dn", num_groups=4000, box_noise=0.4)
    moved = denoising(make_queries(1), targets).reference[0, :-Q] - box
    bounds = 0.4 * torch.tensor([0.1, 0.05, 0.2, 0.1])
    assert (moved.abs() <= bounds + 1e-6).all()
    # Uniform: the standard deviation is the bound over sqrt(3).
    torch.testing.assert_close(moved.std(0), bounds / 3**0.5, rtol=0.05, atol=0)


def test_contrastive_box_noise_stays_in_its_bounds():
    """Corners of positives move by up to 0.4 half sizes, those of negatives by 0.4 to 0.8."""
    box = torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    targets = [Target(torch.tensor([1]), box)]
    denoising = make("contrastive", num_queries=4000, box_noise=0.4)
    queries = denoising(make_queries(1), targets)
    moved = cxcywh_to_xyxy(queries.reference[0, :-Q]) - cxcywh_to_xyxy(box)
    share = (moved / torch.tensor([0.1, 0.05, 0.1, 0.05])).abs().view(4000, 2, 4)
    assert (share[:, 0] <= 0.4 + 1e-5).all()
    assert ((share[:, 1] >= 0.4 - 1e-5) & (share[:, 1] <= 0.8 + 1e-5)).all()
    assert share[:, 0].mean() == pytest.approx(0.2, abs=0.01)
    assert share[:, 1].mean() == pytest.approx(0.6, abs=0.01)
    positive = moved.view(4000, 2, 4)[:, 0, 0] > 0
    assert positive.float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("method", "share"), [("dn", 0.3), ("contrastive", 0.15)])
def test_label_noise(method, share):
    """A drawn label is another one in 4 of 5 cases."""
    targets = [Target(torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
    options = {"num_groups": 8000} if method == "dn" else {"num_queries": 4000}
    denoising = make(method, label_noise=0.3, **options)
    content = denoising(make_queries(1), targets).content[0, :-Q]
    label = denoising.label_embedding.weight[2]
    kept = (content[:, : len(label)] == label).all(1).float().mean()
    assert kept == pytest.approx(1 - share * (NUM_CLASSES - 1) / NUM_CLASSES, abs=0.02)


def test_dn_tells_its_queries_from_others():
    queries = make_queries(1)
    denoising = make("dn", num_groups=2)
    known = denoising(queries, random_targets([3])).content
    assert (known[0, :-Q, -1] == 1).all()
    unknown = denoising.label_embedding.weight[-1]
    torch.testing.assert_close(known[0, -Q:, :-1], queries.content[0, :, :-1] + unknown)
    torch.testing.assert_close(known[0, -Q:, -1], queries.content[0, :, -1])


@pytest.mark.parametrize("method", METHODS)
def test_no_ground_truth_no_denoising(method):
    queries, denoising = make_queries(2), make(method)
    at_inference = denoising(queries, None)
    assert at_inference.denoising is None and at_inference.attention_mask is None
    assert at_inference.content.shape == queries.content.shape
    off = make(method, **{"num_groups" if method == "dn" else "num_queries": 0})
    switched_off = off(queries, random_targets([2, 2]))
    assert switched_off.denoising is None
    torch.testing.assert_close(switched_off.content, at_inference.content)


@pytest.mark.parametrize("method", METHODS)
def test_noise_follows_detectron2s_seed(method):
    denoising, targets = make(method), random_targets([3, 2])

    def references(seed):
        seed_all_rng(seed)
        return denoising(make_queries(2), targets).reference

    assert torch.equal(references(7), references(7))
    assert not torch.equal(references(7), references(8))


# ------------------------------------------------------------------------ inside the detector


VARIANTS = ["dn_tiny", "dino_tiny", "fast_tiny"]


def make_model(variant, *options):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*options, config=variant))
    for parameter in model.transformer.parameters():
        if not parameter.any():  # zeros at the start would hide what depends on what
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_may_see_what_by_gradient(variant):
    """Nothing flows from denoising queries to matching ones, nor from one group to another, nor
    from what stands for no object."""
    model = make_model(variant).train()
    inputs = random_inputs([(64, 96), (64, 96)], [2, 1])
    targets = model.prepare_targets(inputs)
    transformer = model.transformer
    memory = transformer.encoder(model.encode_images(inputs))
    queries = transformer.denoising(transformer.queries(memory)[0], targets)
    content = queries.content.detach().requires_grad_()
    outputs, _ = transformer.decoder(replace(queries, content=content), memory)
    groups, noised = queries.denoising.num_groups, queries.denoising.valid.shape[1]
    size = noised // groups
    assert groups > 1

    def reach(image, place):
        """(image, query) -> bool per query: whether its content matters to that output."""
        output = outputs[-1].logits[image, place].sum() + outputs[-1].boxes[image, place].sum()
        (gradient,) = torch.autograd.grad(output, content, retain_graph=True)
        return gradient.abs().sum(-1) > 0

    matching = reach(0, noised)
    assert not matching[1].any() and not matching[0, :noised].any() and matching[0, noised:].all()
    for image, objects in ((0, 2), (1, 1)):
        seen = reach(image, size)[image]  # the first of the second group
        expected = torch.zeros(noised, dtype=torch.bool)
        expected[size : 2 * size] = queries.denoising.valid[image, size : 2 * size]
        assert torch.equal(seen[:noised], expected)
        assert expected.sum() == objects * (1 if variant == "dn_tiny" else 2)
        assert seen[noised:].all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_matching_queries_predict_as_without(variant):
    model = make_model(variant).train()
    model.backbone.eval()
    inputs = random_inputs([(64, 96), (80, 64)], [3, 1])
    targets = model.prepare_targets(inputs)
    with torch.no_grad():
        memory = model.encode_images(inputs)
        with_noise = model.transformer(memory, targets)
        without = model.transformer(memory)
    assert without.denoising is None and without.noised is None
    for ours, theirs in zip(with_noise.layers, without.layers, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_images_denoising_does_not_depend_on_its_batch_mates(variant):
    """Beside an image with more objects there are queries that stand for none: they change neither
    outputs nor losses."""
    options = ("MODEL.DETR.DENOISING.LABEL_NOISE", 0.0, "MODEL.DETR.DENOISING.BOX_NOISE", 0.0)
    options += ("MODEL.DETR.DENOISING.NUM_QUERIES", 1, "MODEL.DETR.DENOISING.NUM_GROUPS", 1)
    model = make_model(variant, *options).train()
    model.backbone.eval()
    inputs = random_inputs([(64, 96), (64, 96)], [3, 1])
    targets = model.prepare_targets(inputs)
    with torch.no_grad():
        memory = model.encode_images(inputs)
        together = model.transformer(memory, targets)
        alone = model.transformer(model.encode_images(inputs[1:]), targets[1:])
        losses = [
            model.criterion(p, t, object_counts=[1])
            for p, t in ((alone, targets[1:]), (only_image(together, 1), targets[1:]))
        ]
    torch.testing.assert_close(
        together.denoising[-1].boxes[1, :1], alone.denoising[-1].boxes[0, :1], rtol=0, atol=1e-5
    )
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)


def only_image(predictions, image):
    """The predictions of one image, its assignment counted from zero."""
    one = slice(image, image + 1)
    noised = predictions.noised
    here = noised.assignment.images == image
    assignment = noised.assignment._replace(
        images=noised.assignment.images[here] - image,
        queries=noised.assignment.queries[here],
        objects=noised.assignment.objects[here],
    )

    def cut(output):
        return LayerOutput(output.logits[one], output.boxes[one])

    proposals = predictions.proposals
    return Predictions(
        layers=[cut(o) for o in predictions.layers],
        proposals=proposals and proposals._replace(output=cut(proposals.output)),
        denoising=[cut(o) for o in predictions.denoising],
        noised=replace(noised, assignment=assignment, valid=noised.valid[one]),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_perfect_outputs_without_noise_have_hardly_any_denoising_loss(variant):
    model = make_model(variant).train()
    inputs = random_inputs([(64, 96), (80, 64)], [3, 1])
    targets = model.prepare_targets(inputs)
    predictions = model.transformer(model.encode_images(inputs), targets)
    images, queries, objects = predictions.noised.assignment
    logits = torch.full_like(predictions.denoising[0].logits, -20.0)
    boxes = torch.full_like(predictions.denoising[0].boxes, 0.3)
    for image, query, index in zip(images, queries, objects, strict=True):
        logits[image, query, targets[image].classes[index]] = 20.0
        boxes[image, query] = targets[image].boxes[index]
    perfect = [LayerOutput(logits, boxes)] * len(predictions.layers)
    losses = model.criterion(replace(predictions, denoising=perfect), targets)
    denoising = {name: loss.item() for name, loss in losses.items() if "_dn" in name}
    assert len(denoising) == 3 * len(predictions.layers)
    assert max(denoising.values()) < 1e-5
    # And one wrong box shows, as its share of objects and groups.
    boxes[images[0], queries[0], 0] += 0.1
    losses = model.criterion(replace(predictions, denoising=perfect), targets)
    share = predictions.noised.num_groups * 4
    assert losses["loss_bbox_dn"].item() == pytest.approx(5 * 0.1 / share, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_without_objects_train(variant):
    """With the same losses, so that all processes have them, and gradients for every parameter."""
    model = make_model(variant).train()
    losses = model(random_inputs([(64, 96), (80, 64)], [0, 0]))
    assert losses.keys() == model(random_inputs([(64, 96), (80, 64)], [1, 0])).keys()
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("conditional_tiny", ("MODEL.DETR.DEC_LAYERS", 1)),
        ("dab_tiny", ("MODEL.DETR.DEC_LAYERS", 1)),
        ("dn_tiny", ("MODEL.DETR.DENOISING.NUM_GROUPS", 0)),
        ("dino_tiny", ("MODEL.DETR.DENOISING.NUM_QUERIES", 0)),
        ("dino_tiny", ("MODEL.DETR.ENC_LAYERS", 0)),
        ("fast_tiny", ("MODEL.DETR.ENC_LAYERS", 0, "MODEL.DETR.POSITION_EMBEDDING", "learned")),
    ],
)
def test_what_is_not_used_is_frozen(variant, options):
    """Several processes wait for the gradient of everything else. The names stay, whatever the
    first option is."""
    whole, model = make_model(variant, *options[2:]), make_model(variant, *options).train()
    sum(model(random_inputs([(64, 96)], [2])).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert set(model.state_dict()) <= set(whole.state_dict())
    assert any("query_position.scale" in n or "label_embedding" in n for n in model.state_dict())


def test_float16_has_room_for_queries_of_no_object():
    """Images of 3 objects and of 1: what is padded must not become NaN, which nothing hides."""
    model = build_model(tiny_cfg(config="dn_tiny")).train()
    inputs = random_inputs([(64, 96), (64, 96)], [3, 1])
    targets = model.prepare_targets(inputs)
    with torch.autocast("cpu", torch.float16):
        predictions = model.predict_all(inputs, targets)
    for output in predictions.layers + predictions.denoising:
        assert output.logits.isfinite().all() and output.boxes.isfinite().all()
