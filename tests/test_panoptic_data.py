"""Pictures of segments: as ground truth, and as what panoptic quality is computed from."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from detr_d2.data import DetrDatasetMapper, digit_panoptic, digit_scenes, register_digit_panoptic
from detr_d2.data import register_digit_scenes as register_scenes
from detr_d2.data.dataset_mapper import build_augmentation
from detr_d2.data.loader import build_train_loader, build_training_dicts, filter_empty_images
from detr_d2.data.segments import id_to_rgb, read_segments, rgb_to_id
from detr_d2.engine.launch import argument_parser
from detr_d2.engine.main import train_or_evaluate
from detr_d2.errors import UserError
from detr_d2.evaluation import build_evaluator
from detr_d2.evaluation.panoptic_evaluation import PanopticEvaluator

from .helpers import CONFIGS, tiny_cfg


def write_panoptic(folder, ids):
    path = folder / "segments.png"
    Image.fromarray(id_to_rgb(ids)).save(path)
    Image.fromarray(np.zeros((*ids.shape, 3), np.uint8)).save(folder / "image.png")
    return {
        "file_name": str(folder / "image.png"),
        "image_id": 1,
        "height": ids.shape[0],
        "width": ids.shape[1],
        "pan_seg_file_name": str(path),
        "segments_info": [
            {"id": 70000, "category_id": 3, "iscrowd": 0},
            {"id": 5, "category_id": 1, "iscrowd": 1},
            {"id": 9, "category_id": 2},
        ],
    }


@pytest.fixture
def record(tmp_path):
    ids = np.full((20, 30), 9)
    ids[2:8, 3:13] = 70000
    ids[10:15, 20:25] = 5
    return write_panoptic(tmp_path, ids)


def test_ids_and_colours():
    ids = np.array([[0, 255, 256, 70000, 256**3 - 1]])
    assert np.array_equal(rgb_to_id(id_to_rgb(ids)), ids)
    assert id_to_rgb(np.array([[1 + 256 * 2 + 256**2 * 3]])).tolist() == [[[1, 2, 3]]]


def test_panoptic_annotations(record):
    first, crowd, background = read_segments(record)
    assert first["bbox"] == [3, 2, 13, 8] and first["category_id"] == 3
    assert mask_util.area(first["segmentation"]) == 60
    assert crowd["iscrowd"] == 1
    assert background["bbox"] == [0, 0, 30, 20]
    assert mask_util.area(background["segmentation"]) == 600 - 60 - 25


def test_semantic_annotations(tmp_path):
    classes = np.full((6, 8), 255, np.uint8)
    classes[:3] = 4
    classes[4:, :2] = 7
    Image.fromarray(classes).save(tmp_path / "classes.png")
    found = read_segments({"sem_seg_file_name": str(tmp_path / "classes.png")})
    assert [(a["category_id"], a["bbox"]) for a in found] == [(4, [0, 0, 8, 3]), (7, [0, 4, 2, 6])]


def test_the_mapper_moves_segments_with_the_image(record):
    augmentations = build_augmentation(True, min_size=40, max_size=100, flip="none")
    mapper = DetrDatasetMapper(True, augmentations=augmentations, use_instance_mask=True)
    instances = mapper(record)["instances"]
    # The crowd is left out; everything is twice as large.
    assert instances.gt_classes.tolist() == [3, 2]
    assert instances.gt_boxes.tensor.tolist() == [[6, 4, 26, 16], [0, 0, 60, 40]]
    assert instances.gt_masks.tensor.shape == (2, 40, 60)
    assert instances.gt_masks.tensor[0].sum() == 240


def test_segments_are_trained_on_without_masks_too(record):
    """The first stage of DETR's panoptic recipe: boxes of things and stuff."""
    augmentations = build_augmentation(True, min_size=20, max_size=100, flip="none")
    instances = DetrDatasetMapper(True, augmentations=augmentations)(record)["instances"]
    assert instances.gt_classes.tolist() == [3, 2] and not instances.has("gt_masks")
    assert instances.gt_boxes.tensor.tolist() == [[3, 2, 13, 8], [0, 0, 30, 20]]


def test_images_with_segments_are_filtered_and_repeated(record):
    crowd = {**record, "segments_info": [{"id": 5, "category_id": 1, "iscrowd": 1}]}
    semantic = {"file_name": "a.png", "sem_seg_file_name": "b.png", "height": 1, "width": 1}
    assert filter_empty_images([record, crowd, semantic, {}]) == [record, semantic]
    loader = build_train_loader(
        [record, semantic],
        mapper=dict,
        seed=0,
        total_batch_size=1,
        sampler="RepeatFactorTrainingSampler",
        repeat_threshold=0.001,
    )
    assert next(iter(loader.batch_sampler))[0][0] in (0, 1)


def test_classes_that_the_model_does_not_have_are_named(record, tmp_path):
    DatasetCatalog.register(name := f"segments_{tmp_path.name}", lambda: [record])
    try:
        build_training_dicts([name], num_classes=4, num_queries=5)
        message = r"2 segments .* 0\.\.1, first 3 of segment 70000 in .*segments.png"
        with pytest.raises(UserError, match=message):
            build_training_dicts([name], num_classes=2, num_queries=5)
    finally:
        DatasetCatalog.remove(name)

    Image.fromarray(np.array([[0, 5], [255, 1]], np.uint8)).save(tmp_path / "classes.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "small.png")
    semantic = {"sem_seg_file_name": str(tmp_path / "classes.png")}
    semantic["file_name"] = str(tmp_path / "small.png")
    cfg = tiny_cfg("INPUT.MIN_SIZE_TRAIN", (20,), "MODEL.DETR.NUM_CLASSES", 5)
    with pytest.raises(UserError, match=r"classes.png has pixels of class 5, .* 0\.\.4"):
        DetrDatasetMapper(cfg)(semantic)
    cfg.MODEL.DETR.NUM_CLASSES = 6
    DetrDatasetMapper(cfg)(semantic)


def test_what_does_not_fit_is_named(record, tmp_path):
    record["segments_info"].append({"id": 77, "category_id": 0})
    with pytest.raises(UserError, match="segments.png has no pixel of segment 77"):
        read_segments(record)
    with pytest.raises(UserError, match=r"segments.png has 30x20 pixels, .*image.png 31x20"):
        read_segments({**record, "width": 31})
    Image.new("L", (30, 20)).save(tmp_path / "segments.png")
    with pytest.raises(UserError, match="segments.png is not in colour.*save it as RGB"):
        read_segments(record)
    (tmp_path / "segments.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="Cannot read the picture of segments .*segments.png"):
        read_segments(record)


# ------------------------------------------------------------------------------ the embedded one


@pytest.fixture
def few(tmp_path, monkeypatch):
    for module in (digit_scenes, digit_panoptic):
        monkeypatch.setattr(module, "NUM_TRAIN", 3)
        monkeypatch.setattr(module, "NUM_VAL", 4)
    register_scenes(str(tmp_path))
    register_digit_panoptic(str(tmp_path))
    yield tmp_path
    register_scenes()
    register_digit_panoptic()


def test_digits_are_things_and_what_is_behind_them_stuff(few):
    dicts = DatasetCatalog.get("digit_scenes_val_panoptic")
    scenes = DatasetCatalog.get("digit_scenes_val")
    assert len(dicts) == len(scenes) == 4
    for record, scene in zip(dicts, scenes, strict=True):
        assert record["file_name"] == scene["file_name"]
        annotations = read_segments(record)
        assert len(annotations) == len(scene["annotations"]) + 1
        for ours, theirs in zip(annotations, scene["annotations"], strict=False):
            assert ours["category_id"] == theirs["category_id"]
            areas = [mask_util.area(a["segmentation"]) for a in (ours, theirs)]
            assert areas[0] == areas[1]
        assert annotations[-1]["category_id"] in (10, 11)
        total = sum(mask_util.area(a["segmentation"]) for a in annotations)
        assert total == record["height"] * record["width"]


def test_the_photograph_is_the_one_that_was_drawn(few, monkeypatch):
    drawn = []
    original = digit_scenes.choose_setting
    monkeypatch.setattr(
        digit_scenes, "choose_setting", lambda rng: drawn.append(original(rng)) or drawn[-1]
    )
    digit_scenes.draw_scene(
        digit_scenes.generator_of("train", 2, 0), digit_scenes.load_sources()["train"]
    )
    assert digit_scenes.photograph_behind("train", 2) == drawn[0][2]


# ------------------------------------------------------------------------------------- evaluation


def perfect(record):
    """The ground truth as a prediction."""
    with Image.open(record["pan_seg_file_name"]) as picture:
        ids = rgb_to_id(np.asarray(picture))
    segments = [
        {"id": s["id"], "category_id": s["category_id"], "isthing": s["category_id"] < 10}
        for s in record["segments_info"]
    ]
    return {"panoptic_seg": (torch.from_numpy(ids).int(), segments)}


def test_perfect_predictions_have_full_quality(few, tmp_path):
    pytest.importorskip("hotcoco")
    dicts = DatasetCatalog.get("digit_scenes_val_panoptic")
    evaluator = PanopticEvaluator("digit_scenes_val_panoptic", str(tmp_path / "out"))
    evaluator.process(dicts, [perfect(record) for record in dicts])
    numbers = evaluator.evaluate()["panoptic_seg"]
    assert set(numbers) == {a + b for a in ("PQ", "SQ", "RQ") for b in ("", "_th", "_st")}
    assert all(value == pytest.approx(100) for value in numbers.values())
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert {s["category_id"] for a in content["annotations"] for s in a["segments_info"]} <= set(
        range(1, 13)
    )


def test_quality_by_hand(few):
    """One image, no digit found, background right: its IoU is the background's share."""
    pytest.importorskip("hotcoco")
    dicts = DatasetCatalog.get("digit_scenes_val_panoptic")
    evaluator = PanopticEvaluator("digit_scenes_val_panoptic")
    outputs, ious = [], {}
    for record in dicts:
        background = record["segments_info"][-1]
        ids = torch.ones(record["height"], record["width"], dtype=torch.int32)
        segment = {"id": 1, "category_id": background["category_id"], "isthing": False}
        outputs.append({"panoptic_seg": (ids, [segment])})
        share = background["area"] / (record["height"] * record["width"])
        ious.setdefault(background["category_id"], []).append(share)
    assert min(min(v) for v in ious.values()) > 0.5  # all of them match
    evaluator.process(dicts, outputs)
    numbers = evaluator.evaluate()["panoptic_seg"]
    expected = 100 * np.mean([np.mean(values) for values in ious.values()])
    assert numbers["PQ_st"] == pytest.approx(expected, rel=1e-4)
    assert numbers["PQ_th"] == 0


def test_a_model_without_segments_is_told_so(few):
    pytest.importorskip("hotcoco")
    dicts = DatasetCatalog.get("digit_scenes_val_panoptic")
    evaluator = PanopticEvaluator("digit_scenes_val_panoptic")
    with pytest.raises(UserError, match="merges no masks.*PANOPTIC.ENABLED"):
        evaluator.process(dicts[:1], [{"instances": None}])


def test_the_evaluators_of_a_panoptic_model(few):
    pytest.importorskip("hotcoco")
    names = ("digit_scenes_val_panoptic",)
    DatasetCatalog.get(names[0])
    cfg = tiny_cfg("MODEL.MASK_ON", True, "MODEL.DETR.PANOPTIC.ENABLED", True)
    evaluators = build_evaluator(cfg, names[0])._evaluators
    assert [type(e).__name__ for e in evaluators] == ["COCODetectionEvaluator", "PanopticEvaluator"]
    assert evaluators[0]._tasks == ("bbox", "segm")
    metadata = MetadataCatalog.get(names[0])
    assert metadata.thing_classes[-2:] == ["temple", "flower"]
    # Stuff is no detection.
    detections = [{"category_id": 3}, {"category_id": 11}]
    assert evaluators[0]._to_dataset_categories(detections) == [{"category_id": 4}]


def test_the_committed_masks_find_the_digits(few):
    """`--eval-only` with nothing but the config's name, on images that training has not seen."""
    config = CONFIGS / "DigitScenes" / "fast_small_masks.yaml"
    command = f"--eval-only --config-file {config} OUTPUT_DIR {few / 'out'} MODEL.DEVICE cpu"
    results = train_or_evaluate(argument_parser().parse_args(command.split()))
    assert results["bbox"]["AP"] > 80
    assert results["segm"]["AP"] > results["bbox"]["AP"] - 10


def test_images_of_one_name_in_several_folders(few, tmp_path):
    """Their predictions do not overwrite each other."""
    pytest.importorskip("hotcoco")
    evaluator = PanopticEvaluator("digit_scenes_val_panoptic", str(tmp_path / "out"))
    for number, record in enumerate(DatasetCatalog.get("digit_scenes_val_panoptic")):
        moved = {**record, "file_name": f"folder{number}/same.jpg"}
        evaluator.process([moved], [perfect(record)])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100)
