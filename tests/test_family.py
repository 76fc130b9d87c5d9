"""What holds for every design: padding, batch mates and auxiliary losses change no prediction, and
each learns."""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model

from detr_d2.modeling import attention, dropout
from detr_d2.modeling.heads import MLP
from detr_d2.modeling.neck import padding_mask
from detr_d2.structures import Memory

from .helpers import VARIANTS, random_inputs, tiny_cfg
from .test_transformer import assert_equal_outputs


def make_model(variant, *options):
    torch.manual_seed(0)
    model = build_model(tiny_cfg("MODEL.DETR.NUM_OBJECT_QUERIES", 12, *options, config=variant))
    for parameter in model.transformer.parameters():
        if not parameter.any():  # zeros at the start would hide what depends on what
            torch.nn.init.normal_(parameter, std=0.1)
    if hasattr(model.transformer.queries, "memory_norm"):
        # Cells that propose nothing rank low, as in a trained model.
        torch.nn.init.zeros_(model.transformer.queries.memory_proj.bias)
        torch.nn.init.zeros_(model.transformer.queries.memory_norm.bias)
    return model.eval()


def as_maps(memory: Memory, images, shapes) -> Memory:
    """The memory of some of the images on maps of other `shapes`, cropped or padded at the right
    and at the bottom; what is new is padding and holds large values."""
    tokens, positions, padding, ratios = [], [], [], []
    first = 0
    for (height, width), (new_height, new_width) in zip(memory.level_shapes, shapes, strict=True):
        cells = slice(first, first + height * width)
        first += height * width

        def resize(
            values, fill, height=height, width=width, cells=cells, size=(new_height, new_width)
        ):
            old = values[images, cells].view(-1, height, width, *values.shape[2:])
            new = old.new_full((len(old), *size, *values.shape[2:]), fill)
            rows, columns = min(height, size[0]), min(width, size[1])
            new[:, :rows, :columns] = old[:, :rows, :columns]
            return new

        tokens.append(resize(memory.tokens, 100.0).flatten(1, 2))
        positions.append(resize(memory.positions, 100.0).flatten(1, 2))
        mask = resize(memory.padding, True)
        padding.append(mask.flatten(1))
        valid = (~mask).float()
        ratios.append(torch.stack((valid[:, 0].mean(1), valid[:, :, 0].mean(1)), dim=-1))
    return replace(
        memory,
        tokens=torch.cat(tokens, 1),
        positions=torch.cat(positions, 1),
        padding=torch.cat(padding, 1),
        level_shapes=tuple(shapes),
        valid_ratios=torch.stack(ratios, 1),
    )


def memory_of(model, sizes, padded_size):
    """What the neck makes of random features of images of these sizes, multiples of 32."""
    padding = padding_mask(torch.tensor(sizes), padded_size)
    generator = torch.Generator().manual_seed(0)
    features = {}
    for name, shape in model.backbone.output_shape().items():
        height, width = (side // shape.stride for side in padded_size)
        features[name] = torch.randn(len(sizes), shape.channels, height, width, generator=generator)
    with torch.no_grad():
        return model.neck(features, padding)


def tight_shapes(memory, image):
    """Shapes of the levels without the padding of one image."""
    shapes, first = [], 0
    for height, width in memory.level_shapes:
        valid = ~memory.padding[image, first : first + height * width].view(height, width)
        first += height * width
        shapes.append((int(valid[:, 0].sum()), int(valid[0].sum())))
    return shapes


# The box position measured in the padded image is the published DINO's; it is in no config here.
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(variant):
    model = make_model(variant)
    memory = memory_of(model, [(96, 128), (128, 64)], (128, 128))
    together = model.transformer(memory)
    for image in range(2):
        here = [type(o)(*(t[image : image + 1] for t in o)) for o in together.layers]
        alone = as_maps(memory, [image], tight_shapes(memory, image))
        assert not alone.padding.any()
        assert_equal_outputs(here, model.transformer(alone), tolerance=2e-4)
    larger = [(height + 2, width + 3) for height, width in memory.level_shapes]
    padded = model.transformer(as_maps(memory, [0, 1], larger))
    assert_equal_outputs(padded, together, tolerance=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_auxiliary_losses_change_no_prediction(variant):
    """Without them only the last layer is computed, and what the next ones look at."""
    model, inputs = make_model(variant), random_inputs([(64, 96), (80, 64)])
    every, last = (model.predict_all(inputs, last_only=only) for only in (False, True))
    assert len(every.layers) == 3 and len(last.layers) == 1
    assert_equal_outputs(every.layers[-1:], last.layers, tolerance=0)
    assert torch.equal(every.content, last.content)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_where_the_papers_have_it(variant, monkeypatch):
    """In every layer on sub-layers and inside the feed-forward network, and on the weights of
    attention where that has a matrix of them."""
    drawn = []
    for module in (attention, dropout):
        monkeypatch.setattr(module, "drop_out", lambda x, p: drawn.append(p) or x)
    options = ("MODEL.DETR.DROPOUT", 0.25, "MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1)
    model = make_model(variant, *options).train()
    model.predict(random_inputs([(64, 64)]))
    deformable = variant.startswith(("deformable", "dino"))
    in_encoder = 3 if deformable else 4
    in_decoder = 4 + 1 + (0 if deformable or variant == "fast_tiny" else 1)
    assert [p for p in drawn if p] == [0.25] * (in_encoder + in_decoder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_losses(variant):
    """Three for each decoder layer, its denoising queries and the proposals; nothing else, since
    detectron2's trainer sums whatever is there."""
    model = make_model(variant).train()
    losses = model(random_inputs([(64, 96), (80, 64)], [3, 1]))
    suffixes = ["", "_0", "_1"]
    if model.transformer.denoising is not None:
        suffixes += [f"_dn{suffix}" for suffix in suffixes]
    if variant in ("deformable_two_stage_tiny", "dino_tiny", "fast_tiny"):
        suffixes.append("_enc")
    assert losses.keys() == {
        f"loss_{kind}{suffix}" for kind in ("ce", "bbox", "giou") for suffix in suffixes
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_images_are_learnt_by_heart(variant):
    model = make_model(variant, "MODEL.DETR.DEC_LAYERS", 2, "MODEL.DETR.ENC_LAYERS", 1).train()
    inputs = random_inputs([(64, 96), (64, 96)], [2, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    history = []
    for _ in range(80):
        losses = model(inputs)
        # Of matching queries: denoising has new noise in every step.
        history.append(sum(losses[f"loss_{kind}"].item() for kind in ("ce", "bbox", "giou")))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(variant, history[0], history[-1])
    assert history[-1] < 0.35 * history[0]


def test_content_of_dino_starts_within_the_bound_of_its_reset():
    """Of the transformer's parameters, as in its code: (6 / (Q + C)) ** 0.5, not normal."""
    content = build_model(tiny_cfg(config="dino_tiny")).transformer.queries.content.weight
    bound = (6 / sum(content.shape)) ** 0.5
    assert 0.95 * bound < content.abs().max() <= bound


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ("conditional_tiny", {"query_position.scale", "queries.reference_head"}),
        ("dab_tiny", {"query_position.scale", "query_position.box_mlp", "query_position.size_mlp"}),
        ("dino_tiny", {"query_position.box_mlp"}),
    ],
)
def test_initial_weights_are_the_official_ones(variant, parts):
    """Whose reset reaches all in the transformer, by Xavier's bound (6 / (in + out)) ** 0.5;
    prediction heads keep PyTorch's, in ** -0.5."""
    transformer = build_model(tiny_cfg(config=variant)).transformer
    modules = {name.removeprefix("decoder."): m for name, m in transformer.named_modules()}
    mlps = {name for name, module in modules.items() if isinstance(module, MLP)}
    assert parts <= mlps
    for name in mlps:
        for layer in modules[name].layers:
            bound = layer.in_features**-0.5
            if not name.endswith("box_head"):
                bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            largest = layer.weight.abs().max().item()
            if name.endswith("box_head") and layer is modules[name].layers[-1]:
                assert largest == 0  # an offset of nothing
            else:
                assert 0.9 * bound < largest <= bound, name
