"""Class heads and object queries of other numbers than the model's."""

import logging

import pytest
import torch
from detectron2.data import MetadataCatalog

from detr_d2.checkpoint import fit_checkpoint
from detr_d2.checkpoint.class_rows import coco_names, match_classes
from detr_d2.checkpoint.report import LoadReport
from detr_d2.errors import UserError

HEAD = "transformer.decoder.heads.0.class_head.weight"
QUERIES = "transformer.queries.position.weight"
# COCO's categories with the lowest and highest ids, and those around the first hole (there is no
# category 12) in the official list: id -> name.
SOME_COCO = {
    1: "person",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    90: "toothbrush",
}
HOLES = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


@pytest.fixture(autouse=True)
def log_reaches_caplog(monkeypatch):
    """detectron2's setup_logger, called by another test, would keep the records from it."""
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)


def head(rows: int, offset: float = 0.0) -> torch.Tensor:
    """Row i holds i + offset, so a row tells where it comes from."""
    return (torch.arange(rows) + offset).view(-1, 1).expand(rows, 4).clone()


def fit(source, target, source_names=None, target_names=None):
    """The rows of the fitted head: 1000 + i where row i kept its initial value."""
    checkpoint = {"model": {HEAD: source, QUERIES: torch.zeros(2, 4)}}
    if source_names is not None:
        checkpoint["class_names"] = source_names
    model = {HEAD: target, QUERIES: torch.zeros(2, 4)}
    state, report = fit_checkpoint(checkpoint, model, "file.pth", target_names)
    return state[HEAD][:, 0].tolist(), report


def test_coco_head_of_category_ids_is_loaded_unchanged():
    rows, report = fit(head(92), head(92, 1000))
    assert rows == list(range(92))
    assert report.exact and not report.notes


def test_coco_head_maps_to_contiguous_classes():
    names = MetadataCatalog.get("coco_2017_train").thing_classes
    expected = [i for i in range(1, 91) if i not in HOLES] + [91]
    for target_names in (None, names):
        rows, report = fit(head(92), head(81, 1000), target_names=target_names)
        assert rows == expected
        assert not report.exact
    for category, name in SOME_COCO.items():
        assert rows[names.index(name)] == category


def test_contiguous_coco_head_maps_to_category_ids():
    rows, _ = fit(head(81), head(92, 1000))
    assert rows[1] == 0 and rows[13] == 11 and rows[90] == 79 and rows[91] == 80
    assert [rows[i] for i in [0, *HOLES]] == [1000 + i for i in [0, *HOLES]]


def test_panoptic_head_shares_the_category_ids_of_things():
    rows, _ = fit(head(251), head(92, 1000))
    assert rows[90] == 90 and rows[91] == 250
    assert rows[12] == 1012


def test_other_class_counts_map_by_name():
    names = ["unicorn", "Stop Sign", "person"]
    rows, report = fit(head(92), head(4, 1000), target_names=names)
    assert rows == [1000, 13, 1, 91]
    assert "2 of the model's 3 classes" in report.notes[0]


def test_other_class_counts_map_by_the_checkpoints_own_names():
    rows, _ = fit(head(4), head(3, 1000), ["a", "b", "c"], ["c", "a"])
    assert rows == [2, 0, 3]


@pytest.mark.parametrize("names", [(None, ["a", "b"]), (["a", "b", "c"], None)])
def test_other_class_counts_without_names_are_refused(names):
    with pytest.raises(UserError, match="'file.pth' has 3 classes, the model 2.*NUM_CLASSES to 3"):
        fit(head(4), head(3, 1000), *names)


def test_a_new_class_head_keeps_no_object_alone():
    checkpoint = {"model": {HEAD: head(4), QUERIES: torch.zeros(2, 4)}}
    model = {HEAD: head(3, 1000), QUERIES: torch.zeros(2, 4)}
    state, report = fit_checkpoint(checkpoint, model, "file.pth", None, new_class_head=True)
    assert state[HEAD][:, 0].tolist() == [1000, 1001, 3]
    assert report.new_classes == 2 and not report.exact


def test_placeholder_names_of_hugging_face_are_no_names():
    rows, report = fit(head(3), head(4, 1000), ["LABEL_0", "LABEL_1"], ["LABEL_0", "x", "N/A"])
    assert rows == [1000, 1001, 1002, 2]
    assert report.new_classes == 3


def test_same_classes_in_another_order_are_reordered():
    rows, report = fit(head(4), head(4, 1000), ["a", "b", "c"], ["c", "a", "b"])
    assert rows == [2, 0, 1, 3]
    assert not report.exact


def test_as_many_classes_of_which_some_are_new_map_by_name():
    rows, report = fit(head(4), head(4, 1000), ["a", "b", "c"], ["b", "a", "d"])
    assert rows == [1, 0, 1002, 3]
    assert report.new_classes == 1


def test_as_many_other_classes_are_loaded_unchanged_with_a_warning():
    rows, report = fit(head(3), head(3, 1000), ["a", "b"], ["c", "d"])
    assert rows == [0, 1, 2]
    assert "'a', 'b'" in report.notes[0] and "'c', 'd'" in report.notes[0]


# ------------------------------------------------------------- sigmoid heads and what has rows too

SIGMOID_HEAD = "transformer.decoder.heads.2.class_head.weight"
PROPOSALS = "transformer.queries.head.class_head.weight"
LABELS = "transformer.denoising.label_embedding.weight"
POSITION_PROJ = "transformer.queries.position_proj.weight"


def official_dino(rows: int, labels: int) -> dict[str, torch.Tensor]:
    """As few tensors as an official DINO is recognised by, with rows for classes."""
    return {
        "backbone.0.body.conv1.weight": head(1),
        "transformer.level_embed": head(1),
        "transformer.enc_out_class_embed.weight": head(rows),
        "class_embed.0.weight": head(rows),
        "label_enc.weight": head(labels),
    }


def fit_sigmoid(source: dict, sizes: dict, names=None, **options):
    """The rows of each tensor of a sigmoid model; `sizes`: name -> number of rows."""
    model = {name: head(size, 1000) for name, size in sizes.items()}
    state, report = fit_checkpoint(
        {"model": source}, model, "f.pth", names, no_object=False, **options
    )
    return {name: tensor[:, 0].tolist() for name, tensor in state.items()}, report


DINO_HEAD = "transformer.decoder.heads.0.class_head.weight"
DINO = {DINO_HEAD: 91, PROPOSALS: 91, LABELS: 92, "neck.level_embedding": 1}
DINO["backbone.stem.conv1.weight"] = 1


def test_sigmoid_coco_heads_are_loaded_unchanged():
    rows, report = fit_sigmoid(official_dino(91, 92), DINO)
    assert report.exact and not report.notes
    assert rows[DINO_HEAD] == rows[PROPOSALS] == list(range(91))


def test_sigmoid_coco_heads_map_to_contiguous_classes():
    sizes = DINO | {DINO_HEAD: 80, PROPOSALS: 80, LABELS: 81}
    rows, report = fit_sigmoid(official_dino(91, 92), sizes)
    expected = [i for i in range(1, 91) if i not in HOLES]
    assert rows[DINO_HEAD] == rows[PROPOSALS] == expected
    assert rows[LABELS] == [*expected, 91]
    assert report.new_classes == 0 and not report.initial


def test_sigmoid_heads_map_by_name():
    sizes = DINO | {DINO_HEAD: 3, PROPOSALS: 3, LABELS: 4}
    rows, report = fit_sigmoid(official_dino(91, 92), sizes, ["unicorn", "stop sign", "person"])
    assert rows[DINO_HEAD] == rows[PROPOSALS] == [1000, 13, 1]
    assert rows[LABELS] == [1000, 13, 1, 91]
    assert report.new_classes == 1


def test_more_labels_than_classes():
    """DINO's label book may be larger than its class head; its last row is still "no label"."""
    sizes = DINO | {DINO_HEAD: 91, PROPOSALS: 91, LABELS: 92}
    rows, report = fit_sigmoid(official_dino(91, 101), sizes)
    assert rows[LABELS] == [*range(91), 100]
    assert report.fitted == [LABELS]


def test_new_sigmoid_class_head():
    rows, report = fit_sigmoid(official_dino(91, 92), DINO, new_class_head=True)
    assert rows[DINO_HEAD] == rows[PROPOSALS] == [1000 + i for i in range(91)]
    assert rows[LABELS] == [1000 + i for i in range(91)] + [91]
    assert report.new_classes == 91


@pytest.mark.parametrize("new_class_head", [False, True])
def test_row_0_of_class_agnostic_proposals_stays(new_class_head):
    source = {SIGMOID_HEAD: head(91), PROPOSALS: head(91), POSITION_PROJ: head(1)}
    sizes = {SIGMOID_HEAD: 2, PROPOSALS: 2, POSITION_PROJ: 1}
    rows, report = fit_sigmoid(source, sizes, ["dog", "cat"], new_class_head=new_class_head)
    assert rows[SIGMOID_HEAD] == ([1000, 1001] if new_class_head else [18, 17])
    assert rows[PROPOSALS] == [0, 1001 if new_class_head else 17]
    assert report.new_classes == (2 if new_class_head else 0)


@pytest.mark.parametrize("no_object", [False, True])
def test_class_names_tell_whether_own_heads_end_with_no_object(no_object):
    """Three classes, of which the model has two, in another order."""
    source = {
        "model": {HEAD: head(3 + no_object), QUERIES: head(1)},
        "class_names": ["a", "b", "c"],
    }
    for wanted in (False, True):
        model = {HEAD: head(2 + wanted, 1000), QUERIES: head(1)}
        state, report = fit_checkpoint(source, model, "f.pth", ["c", "a"], no_object=wanted)
        last = [3 if no_object else 1002] if wanted else []
        assert state[HEAD][:, 0].tolist() == [2, 0, *last]
        assert report.new_classes == 0
        assert any("softmax" in note for note in report.notes) == (wanted != no_object)


def test_official_heads_are_known_to_be_of_one_kind():
    """Softmax where the format has it, whatever the model has, and no row is taken for another."""
    source = {"model": official_dino(91, 92)}
    sizes = DINO | {DINO_HEAD: 92, PROPOSALS: 92}
    model = {name: head(size, 1000) for name, size in sizes.items()}
    state, report = fit_checkpoint(source, model, "f.pth")
    assert state[DINO_HEAD][:, 0].tolist() == [*range(91), 1091]
    assert any("sigmoid, the model has softmax" in note for note in report.notes)

    source = {"backbone.0.body.conv1.weight": head(1), "class_embed.weight": head(92)}
    rows, _ = fit_sigmoid(source, {DINO_HEAD: 91, "backbone.stem.conv1.weight": 1})
    assert rows[DINO_HEAD] == list(range(91))


def test_number_of_learned_boxes_and_contents_may_differ_but_no_other_shape():
    names = [f"transformer.queries.{name}.weight" for name in ("anchors", "content", "memory_proj")]
    model = {name: head(8, 1000) for name in names}
    state, report = fit_checkpoint({"model": {name: head(5) for name in names}}, model, "f.pth")
    assert list(state) == report.fitted == names[:2]
    assert all(
        tensor[:, 0].tolist() == [0, 1, 2, 3, 4, 1005, 1006, 1007] for tensor in state.values()
    )
    assert report.initial == names[2:] and any("memory_proj" in note for note in report.notes)


# --------------------------------------------------------------------------- one head or several


def heads_of(*values: float) -> dict[str, torch.Tensor]:
    """Box heads of as many decoder layers."""
    return {
        f"transformer.decoder.heads.{layer}.box_head.layers.0.weight": head(4, value)
        for layer, value in enumerate(values)
    }


def test_one_head_becomes_one_for_each_layer():
    source = {QUERIES: head(1), **heads_of(5)}
    model = {QUERIES: head(1), **heads_of(0, 0, 0)}
    state, report = fit_checkpoint({"model": source}, model, "f.pth")
    values = [state[name][0, 0] for name in heads_of(0, 0, 0)]
    assert values == [5, 5, 5]
    assert not report.exact and "copy" in report.notes[0]


def test_equal_heads_become_one():
    source = {QUERIES: head(1), **heads_of(5, 5, 5)}
    state, report = fit_checkpoint({"model": source}, {QUERIES: head(1), **heads_of(0)}, "f.pth")
    assert report.exact and not report.notes
    assert state[next(iter(heads_of(0)))][0, 0] == 5


def test_of_different_heads_the_first_is_loaded_loudly():
    source = {QUERIES: head(1), **heads_of(5, 6, 7)}
    model = {QUERIES: head(1), **heads_of(0)}
    state, report = fit_checkpoint({"model": source}, model, "f.pth")
    assert state[next(iter(heads_of(0)))][0, 0] == 5
    assert report.ignored == list(heads_of(5, 6, 7))[1:]
    assert "MODEL.DETR.SHARED_HEADS" in report.notes[0]


def test_fewer_or_more_layers_with_a_head_each():
    """Not a case of shared heads: what both have is loaded, nothing is copied."""
    for theirs, ours in ((2, 3), (3, 2)):
        source = {QUERIES: head(1), **heads_of(*range(theirs))}
        model = {QUERIES: head(1), **heads_of(*[9] * ours)}
        state, report = fit_checkpoint({"model": source}, model, "f.pth")
        assert len(state) == 3 and not report.notes
        assert [state[name][0, 0] for name in heads_of(0, 0)] == [0, 1]


# -------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize(("theirs", "ours"), [(5, 8), (8, 5)])
def test_number_of_queries_may_differ(theirs, ours, caplog):
    checkpoint = {"model": {QUERIES: head(theirs)}}
    model = {QUERIES: head(ours, 1000)}
    state, report = fit_checkpoint(checkpoint, model, "file.pth")
    expected = [0, 1, 2, 3, 4] + [1005, 1006, 1007][: max(0, ours - theirs)]
    assert state[QUERIES][:, 0].tolist() == expected
    report.log("file.pth")
    assert f"{theirs} object queries" in caplog.text
    assert model[QUERIES][0, 0] == 1000  # the model itself is not touched


def test_half_precision_weights_take_the_precision_of_the_model():
    rows, _ = fit(head(92).half(), head(81, 1000))
    assert rows[0] == 1.0
    state, _ = fit_checkpoint({"model": {HEAD: head(92).half()}}, {HEAD: head(81)}, "file.pth")
    assert state[HEAD].dtype == torch.float32


def test_report_counts_tensors_by_part():
    checkpoint = {
        "model": {HEAD: head(3), QUERIES: head(2), "transformer.decoder.norm.bias": head(1)}
    }
    model = {HEAD: head(3), QUERIES: head(2), "transformer.decoder.norm.bias": head(1)}
    model |= {f"transformer.encoder.layers.{i}.ffn.linear1.bias": head(1) for i in range(2)}
    checkpoint["model"]["transformer.encoder.layers.7.ffn.linear1.bias"] = head(1)
    _, report = fit_checkpoint(checkpoint, model, "file.pth")
    table = [line.split() for line in report.table().splitlines()]
    assert ["class", "head", "1", "0", "0", "0"] in table
    assert ["encoder", "0", "0", "2", "1"] in table
    assert not report.exact and not report.transformer_untrained


def test_many_tensors_of_an_unknown_kind_are_another_model():
    checkpoint = {"model": {QUERIES: head(2), "transformer.level_embed": head(1)}}
    with pytest.raises(UserError, match="file.pth.*another model.*transformer.level_embed"):
        fit_checkpoint(checkpoint, {QUERIES: head(2)}, "file.pth")


def test_panoptic_rows_map_to_contiguous_things_and_stuff():
    """250 rows by category id: 80 things with ten holes, 53 kinds of stuff from 92 on."""
    source = {"model": {HEAD: head(251), QUERIES: head(1)}}
    names = coco_names(133)
    assert len(names) == 133 and names[79:81] == ["toothbrush", "banner"]
    model = {HEAD: head(134, 1000), QUERIES: head(1)}
    state, report = fit_checkpoint(source, model, "f.pth", names)
    rows = state[HEAD][:, 0].tolist()
    assert rows[:80] == [i for i in range(1, 91) if i not in HOLES]
    assert rows[80] == 92 and rows[132] == 200 and rows[133] == 250
    assert report.new_classes == 0


def test_letters_are_told_apart_by_their_capitals():
    names = ["A", "a", "b"]
    assert match_classes(3, 3, names, names) == (None, "")
    assert match_classes(2, 2, ["a", "a"], ["a", "a"]) == (None, "")
    assert match_classes(3, 2, names, ["a", "A"])[0] == [1, 0]
    assert match_classes(3, 2, names, ["B", "A"])[0] == [2, 0]


def test_classes_that_were_never_trained_are_not_evaluated():
    report = LoadReport("test", loaded=["transformer.x"], new_classes=2)
    with pytest.raises(UserError, match="2 of the model's classes were never trained in 'a.pth'"):
        report.refuse_untrained("a.pth")
    LoadReport("test", loaded=["transformer.x"]).refuse_untrained("a.pth")
