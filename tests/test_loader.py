"""The training stream: what it depends on, and what it does not depend on."""

import gc
import logging
import multiprocessing
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BoxMode
from PIL import Image

from detr_d2.data import classes_of
from detr_d2.data.dataset_mapper import DetrDatasetMapper, build_augmentation
from detr_d2.data.loader import (
    ResumableBatchSampler,
    SeededDataset,
    build_test_dicts,
    build_test_loader,
    build_train_loader,
    build_training_dicts,
    derive_seed,
    images_per_forward,
    warn_of_few_queries,
)
from detr_d2.errors import UserError

from .training import fake_rank, training_cfg, unregistering


@pytest.fixture
def make_loader(rectangles, tmp_path):
    """(seed, key, value, …) -> training loader."""
    return lambda seed, *options: build_train_loader(
        training_cfg(rectangles, tmp_path, *options), seed
    )


@pytest.fixture
def caplog(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    return caplog


def draw(loader, count, start=0):
    """Batches `start` to `start + count`, each a list of (file, pixels, boxes)."""
    loader.batch_sampler.start_batch = start
    return [
        [(x["file_name"], x["image"], x["instances"].gt_boxes.tensor) for x in batch]
        for batch in islice(iter(loader), count)
    ]


def assert_same(first, second):
    assert [[x[0] for x in batch] for batch in first] == [[x[0] for x in b] for b in second]
    for batch, other in zip(first, second, strict=True):
        for one, another in zip(batch, other, strict=True):
            assert torch.equal(one[1], another[1])
            assert torch.equal(one[2], another[2])


def test_batches_do_not_depend_on_workers(make_loader):
    expected = draw(make_loader(5), 6)
    for workers in (1, 2):
        assert_same(draw(make_loader(5, "DATALOADER.NUM_WORKERS", workers), 6), expected)


def test_starting_later_is_skipping(make_loader):
    """Across several epochs of 12 images in batches of 4, with another augmentation in each."""
    everything = draw(make_loader(5), 10)
    assert_same(draw(make_loader(5), 3, start=7), everything[7:])


def test_each_epoch_has_every_image_once_with_new_augmentation(make_loader):
    first, second = draw(make_loader(5), 3), draw(make_loader(5), 3, start=3)
    names = [sorted(x[0] for batch in epoch for x in batch) for epoch in (first, second)]
    assert names[0] == names[1] and len(set(names[0])) == 12
    pixels = [{x[0]: x[1] for batch in epoch for x in batch} for epoch in (first, second)]
    changed = [not torch.equal(pixels[0][name], pixels[1][name]) for name in names[0]]
    assert any(changed)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="of Linux")
def test_memory_of_workers_is_flat_over_epochs(tmp_path):
    """Python objects that workers read are copied page by page, as reading counts references: with
    COCO's annotations that is gigabytes. The 50 MB here stay where they are."""
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    record = {"file_name": str(tmp_path / "image.png"), "height": 16, "width": 16}
    dataset = [{**record, "polygon": [i + n / 7 for n in range(4000)]} for i in range(400)]
    augmentations = build_augmentation(True, min_size=[16], max_size=16)
    mapper = DetrDatasetMapper(True, augmentations=augmentations)

    def read(record):
        sum(record["polygon"])
        return mapper({key: value for key, value in record.items() if key != "polygon"})

    loader = build_train_loader(dataset, mapper=read, seed=0, total_batch_size=50, num_workers=1)
    del dataset
    gc.collect()
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    sizes = []
    for _ in range(1 + 3 * 400 // 50):  # three epochs
        next(batches)
        [worker] = set(multiprocessing.active_children()) - others
        sizes.append(own_memory(worker.pid))
    assert max(sizes) - sizes[0] < 8, sizes


def own_memory(pid: int) -> float:
    """MiB that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def test_seeds_differ(make_loader):
    order = [[x[0] for batch in draw(make_loader(seed), 3) for x in batch] for seed in (1, 2)]
    assert order[0] != order[1]


def test_derived_seeds():
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, 4) == derive_seed(3, 4)


def test_ranks_share_the_stream(make_loader):
    """Two processes together see what one process sees, image by image."""
    alone = [x for batch in draw(make_loader(5), 6) for x in batch]
    halves = []
    for rank in (0, 1):
        with fake_rank(rank, 2):
            halves.append([x for batch in draw(make_loader(5), 6) for x in batch])
    assert [len(half) for half in halves] == [12, 12]
    together = [x for pair in zip(*halves, strict=True) for x in pair]
    assert_same([together], [alone])


def test_random_numbers_of_the_process_are_left_alone(make_loader):
    loader = make_loader(5)
    batches = iter(loader)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    next(batches)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_augmentation_does_not_depend_on_the_process(make_loader):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw(make_loader(5), 2)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert_same(draw(make_loader(5), 2), expected)


def test_every_random_generator_is_seeded_by_the_place_in_the_stream():
    def mapper(record):
        return record["index"], random.random(), np.random.rand(), torch.rand(1).item()

    records = [{"index": i} for i in range(4)]
    dataset = SeededDataset(records, mapper, seed=1)
    first = dataset[2, 7, 0]
    torch.rand(3), np.random.rand(), random.random()
    assert dataset[2, 7, 0] == dataset[2, 7, 1] == first
    for other in (dataset[2, 8, 0], SeededDataset(records, mapper, seed=2)[2, 7, 0]):
        assert all(a != b for a, b in zip(first[1:], other[1:], strict=True))


def test_aspect_ratio_grouping(make_loader):
    def is_mixed(batch):
        return len({image.shape[2] > image.shape[1] for _, image, _ in batch}) > 1

    options = ("INPUT.RANDOM_FLIP", "none", "SOLVER.IMS_PER_BATCH", 2)
    key = "DATALOADER.ASPECT_RATIO_GROUPING"
    grouped = draw(make_loader(5, *options, key, True), 20)
    assert not any(map(is_mixed, grouped))
    assert any(map(is_mixed, draw(make_loader(5, *options, key, False), 20)))
    assert_same(draw(make_loader(5, *options, key, True), 5, start=15), grouped[15:])


def test_batches_of_groups():
    """Indices 0 to 5 in groups a b a a b a, two per batch: written out by hand."""
    sampler = ResumableBatchSampler(range(6), 2, groups=[0, 1, 0, 0, 1, 0])
    batches = [[(0, 0, 0), (2, 2, 0)], [(1, 1, 1), (4, 4, 1)], [(3, 3, 2), (5, 5, 2)]]
    assert list(sampler) == batches
    sampler.start_batch = 1
    assert list(sampler) == batches[1:]
    sampler.start_batch = 0
    with fake_rank(1, 3):
        assert next(iter(sampler)) == [(0, 1, 0), (2, 7, 0)]


def test_one_size_per_batch(make_loader):
    """The shorter side: of all images of a batch, in all processes; another for other batches, and
    after an interruption the same."""

    def sides(batches):
        per_batch = [{min(image.shape[1:]) for _, image, _ in batch} for batch in batches]
        assert all(len(side) == 1 for side in per_batch)
        return [side.pop() for side in per_batch]

    options = ("INPUT.MIN_SIZE_TRAIN", (24, 32, 40), "INPUT.MAX_SIZE_TRAIN", 200)
    mixed = draw(make_loader(5, *options), 12)
    assert any(len({min(image.shape[1:]) for _, image, _ in batch}) > 1 for batch in mixed)
    options += ("INPUT.MIN_SIZE_TRAIN_PER_BATCH", True)
    batches = draw(make_loader(5, *options), 12)
    assert set(sides(batches)) == {24, 32, 40}
    assert_same(draw(make_loader(5, *options), 3, start=9), batches[9:])
    assert_same(draw(make_loader(5, *options, "DATALOADER.NUM_WORKERS", 2), 4), batches[:4])
    with fake_rank(1, 2):
        assert sides(draw(make_loader(5, *options), 6)) == sides(batches[:6])
    style = ("INPUT.MIN_SIZE_TRAIN", (24, 40), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    drawn = sides(draw(make_loader(5, *options, *style), 12))
    assert len(set(drawn)) > 3 and 24 <= min(drawn) <= max(drawn) <= 40


def test_samplers(make_loader, monkeypatch):
    assert isinstance(make_loader(0).batch_sampler.indices, TrainingSampler)
    options = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    options += ("DATALOADER.REPEAT_THRESHOLD", 1.0)
    loader = make_loader(0, *options)
    assert isinstance(loader.batch_sampler.indices, RepeatFactorTrainingSampler)
    counted = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    asked = []
    monkeypatch.setattr(
        RepeatFactorTrainingSampler,
        "repeat_factors_from_category_frequency",
        staticmethod(lambda d, t, sqrt: (asked.append((t, sqrt)), counted(d, t, sqrt))[1]),
    )
    make_loader(0, *options, "DATALOADER.REPEAT_SQRT", False)
    assert asked == [(1.0, False)]
    with pytest.raises(UserError, match="SAMPLER_TRAIN is 'Nope'.*RepeatFactorTrainingSampler"):
        make_loader(0, "DATALOADER.SAMPLER_TRAIN", "Nope")


def test_images_of_unknown_shape_are_not_grouped():
    """As of detectron2's panoptic and semantic data sets."""
    images = [{"file_name": "a.jpg"}]
    with pytest.raises(UserError, match="width and height .*ASPECT_RATIO_GROUPING False"):
        build_train_loader(
            images, mapper=dict, seed=0, total_batch_size=1, aspect_ratio_grouping=True
        )


@pytest.mark.parametrize("sqrt", [True, False])
def test_rare_classes_are_repeated(sqrt):
    """Class 1 is on 1 of 4 images, so with the threshold 1 its factor is sqrt(1 / 0.25) = 2;
    class 0 is on 3 of 4: sqrt(4 / 3). The expected shares follow. Without the root: 4 and 4 / 3."""
    dicts = [
        {"annotations": [{"category_id": int(i == 0)}], "width": 1, "height": 1} for i in range(4)
    ]
    loader = build_train_loader(
        dicts,
        mapper=dict,
        seed=0,
        total_batch_size=1,
        sampler="RepeatFactorTrainingSampler",
        repeat_threshold=1.0,
        repeat_sqrt=sqrt,
    )
    drawn = [batch[0][0] for batch in islice(loader.batch_sampler, 4000)]
    power = 0.5 if sqrt else 1.0
    expected = 4**power / (4**power + 3 * (4 / 3) ** power)
    assert drawn.count(0) / len(drawn) == pytest.approx(expected, abs=0.02)


def test_images_per_forward():
    assert images_per_forward(16, 1) == 16
    assert images_per_forward(16, 4) == 4
    with fake_rank(0, 2):
        assert images_per_forward(16, 4) == 2
        with pytest.raises(UserError, match=r"IMS_PER_BATCH \(6\).*processes \(2\).*STEPS \(2\)"):
            images_per_forward(6, 2)
    with pytest.raises(UserError, match=r"IMS_PER_BATCH \(0\)"):
        images_per_forward(0, 1)
    with pytest.raises(UserError, match="ACCUMULATION_STEPS is 0"):
        images_per_forward(4, 0)


def test_unusable_images_are_replaced():
    records = [{"image": i} for i in range(4)]
    dataset = SeededDataset(records, lambda x: None if x["image"] == 2 else x, seed=0)
    drawn = [dataset[2, position, 0]["image"] for position in range(20)]
    assert set(drawn) == {0, 1, 3}
    assert drawn == [dataset[2, position, 0]["image"] for position in range(20)]


def test_nothing_usable_is_an_error():
    dataset = SeededDataset([{}, {}], lambda x: None, seed=0)
    with pytest.raises(UserError, match="100 images in a row"):
        dataset[0, 0, 0]
    random.seed(0)
    before = random.random()
    random.seed(0)
    with pytest.raises(UserError):
        dataset[0, 0, 0]
    assert random.random() == before


def test_nothing_to_train_on(rectangles, tmp_path):
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        build_training_dicts([], num_classes=3, num_queries=7)
    cfg = training_cfg(rectangles, tmp_path, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", True)
    assert len(build_training_dicts(cfg)) == 9  # every fourth of 12 images is empty


def test_corners_given_as_width_and_height_are_not_evaluated(rectangles, tmp_path):
    cfg = training_cfg(rectangles, tmp_path)
    assert len(build_test_loader(cfg, rectangles)) == 12
    corners = [
        {"bbox": [20 + i, 20, 60, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        for i in range(5)
    ]
    record = {"file_name": "a.png", "height": 64, "width": 64, "annotations": corners}
    DatasetCatalog.register(name := f"corners_{tmp_path.name}", lambda: [record])
    try:
        with pytest.raises(UserError, match=f"'{name}' look like x0, y0, x1, y1"):
            build_test_loader(cfg, name)
    finally:
        DatasetCatalog.remove(name)


def test_data_set_without_images(monkeypatch, rectangles, tmp_path):
    monkeypatch.setattr("detr_d2.data.loader.check_annotations", lambda *args, **options: [])
    with pytest.raises(UserError, match=f"{rectangles}.* has no image to train on"):
        build_training_dicts(training_cfg(rectangles, tmp_path))


def test_more_objects_than_queries(caplog):
    def image(objects, crowds=0):
        return {"annotations": [{}] * objects + [{"iscrowd": 1}] * crowds}

    warn_of_few_queries([image(3), image(2, crowds=5), {}], num_queries=3)
    assert not caplog.records
    warn_of_few_queries([image(4), image(9), image(3)], num_queries=3)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of 3 images have more objects (up to 9)" in record.getMessage()
    assert "NUM_OBJECT_QUERIES, now 3" in record.getMessage()
    assert "TEST.DETECTIONS_PER_IMAGE with it" in record.getMessage()


def test_background_is_trained_on_beside_objects_but_not_alone(
    rectangles, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    image = {"file_name": "a.jpg", "image_id": 0, "width": 20, "height": 20, "annotations": []}
    with unregistering():
        DatasetCatalog.register("background", lambda: [image])
        MetadataCatalog.get("background").thing_classes = classes_of([rectangles])
        both = training_cfg(rectangles, tmp_path, "DATASETS.TRAIN", (rectangles, "background"))
        assert len(build_training_dicts(both)) == 13
        alone = training_cfg(rectangles, tmp_path, "DATASETS.TRAIN", ("background",))
        with pytest.raises(UserError, match="background. has no object to train on"):
            build_training_dicts(alone)
        assert build_test_dicts("background") == [image]
    assert "data set background has no object: it gives no AP" in caplog.text


def test_objects_that_cannot_be_found_are_named_before_an_evaluation(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    boxes = [[0, 0, 0, 0], [50, 50, 9, 9], [1, 1, 4, 4]]
    at = [{"bbox": b, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for b in boxes]
    image = {"file_name": "a.jpg", "image_id": 0, "width": 20, "height": 20, "annotations": at}
    with unregistering():
        DatasetCatalog.register("with_faults", lambda: [image])
        assert build_test_dicts("with_faults") == [image]
    assert "2 faulty annotations in data set 'with_faults'" in caplog.text
    assert "a.jpg: annotation number 1 of this image: box [50, 50, 9, 9] lies out" in caplog.text
