"""Bringing one's own COCO-format data: what is accepted, and one sentence for everything else."""

import copy
import json
import logging
import os
import re
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from detr_d2.data import (
    check_same_classes,
    classes_of,
    parse_register_argument,
    register_coco_dataset,
)
from detr_d2.data import register as register_module
from detr_d2.data.coco_json import DatasetError, read_coco_json
from detr_d2.data.register import load_coco_dataset
from detr_d2.errors import UserError

SOUND = {
    "info": {},
    "images": [
        {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 10},
    ],
    "annotations": [
        {
            "id": 9,
            "image_id": 3,
            "category_id": 20,
            "bbox": [1, 2, 3, 4.5],
            "area": 13.5,
            "iscrowd": 0,
            "segmentation": [[1, 2, 4, 2, 4, 6.5]],
        },
        {
            "id": 4,
            "image_id": 5,
            "category_id": 7,
            "bbox": [0, 0, 9, 9],
            "area": 81,
            "iscrowd": 1,
            "segmentation": {"counts": [0, 1200], "size": [30, 40]},
        },
    ],
    "categories": [{"id": 20, "name": "dog"}, {"id": 7, "name": "cat"}],
}


@pytest.fixture
def files(tmp_path):
    """Writes an annotation file and its images; gives their paths and a name that is not taken."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for image in SOUND["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(images / image["file_name"])

    def write(content=SOUND):
        path = tmp_path / f"{uuid4().hex}.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return SimpleNamespace(write=write, images=str(images), name=f"set_{uuid4().hex}")


def changed(change):
    content = copy.deepcopy(SOUND)
    change(content)
    return content


# The command line


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a=b.json:c", ("a", "b.json", "c")),
        ("a=/x/b.json:/y/c", ("a", "/x/b.json", "/y/c")),
        ("a=x=1/b.json:y=2/c", ("a", "x=1/b.json", "y=2/c")),
        ("a=C:\\x\\b.json:D:\\y", ("a", "C:\\x\\b.json", "D:\\y")),
        ("a=C:/x/b.json:y", ("a", "C:/x/b.json", "y")),
        ("a=b.json:D:/y", ("a", "b.json", "D:/y")),
        ("a=s3://x/b.json:s3://y", ("a", "s3://x/b.json", "s3://y")),
        ("a=my data/b.json:my images", ("a", "my data/b.json", "my images")),
    ],
)
def test_register_argument(argument, expected):
    assert parse_register_argument(argument) == expected


@pytest.mark.parametrize(
    "argument", ["", "a", "a=b.json", "=b.json:c", "a=b.json:", "a=:c", "a=C:\\b"]
)
def test_register_argument_with_a_part_missing(argument):
    with pytest.raises(UserError, match="NAME=annotations.json:image_dir") as caught:
        parse_register_argument(argument)
    assert f"'--register {argument}'" in str(caught.value)


# What is registered


def test_registered_data_and_metadata(files):
    json_file = files.write()
    register_coco_dataset(files.name, json_file, files.images)
    metadata = MetadataCatalog.get(files.name)
    # In the order of the ids, not of the file.
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 20: 1}
    assert metadata.evaluator_type == "coco"
    assert (metadata.json_file, metadata.image_root) == (json_file, files.images)

    first, second = DatasetCatalog.get(files.name)
    assert first["file_name"] == f"{files.images}/a.png"
    assert (first["image_id"], first["height"], first["width"]) == (5, 30, 40)
    assert second["file_name"] == f"{files.images}/sub/b.png"
    [dog] = second["annotations"]
    assert (dog["id"], dog["category_id"], dog["iscrowd"]) == (9, 1, 0)
    assert dog["bbox"] == [1, 2, 3, 4.5] and dog["bbox_mode"] == BoxMode.XYWH_ABS
    assert dog["segmentation"] == [[1, 2, 4, 2, 4, 6.5]]
    [crowd] = first["annotations"]
    assert (crowd["category_id"], crowd["iscrowd"]) == (0, 1)


def test_same_content_as_detectron2_loads(files):
    """detectron2's own loader, on a file that it accepts, is the reference."""
    json_file = files.write()
    ours = sorted(load_coco_dataset(json_file, files.images), key=lambda d: d["image_id"])
    theirs = load_coco_json(json_file, files.images, f"other_{files.name}", ["id"])
    assert ours == theirs


@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (3, 90), (90, 3), (-1, 5)])
def test_category_ids_may_start_anywhere_and_have_holes(files, ids):
    def renumber(content):
        for category, annotation, new in zip(
            content["categories"], content["annotations"], ids, strict=True
        ):
            category["id"] = annotation["category_id"] = new

    register_coco_dataset(files.name, files.write(changed(renumber)), files.images)
    dog_first = ids[0] < ids[1]
    assert classes_of([files.name]) == (["dog", "cat"] if dog_first else ["cat", "dog"])
    by_id = {a["id"]: a for d in DatasetCatalog.get(files.name) for a in d["annotations"]}
    assert by_id[9]["category_id"] == (0 if dog_first else 1)
    assert by_id[4]["category_id"] == (1 if dog_first else 0)


def test_images_without_objects_are_kept(files):
    content = changed(lambda c: c["annotations"].pop())
    register_coco_dataset(files.name, files.write(content), files.images)
    assert [len(d["annotations"]) for d in DatasetCatalog.get(files.name)] == [0, 1]


def test_a_useless_segmentation_does_not_cost_the_object_its_box(files):
    sizes = [{"counts": "", "size": size} for size in ([10], [20, 10], 10)]
    for useless in ([], [[]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], None, {}, *sizes):

        def spoil(content, value=useless):
            content["annotations"][0]["segmentation"] = value

        _, image = load_coco_dataset(files.write(changed(spoil)), files.images)
        [annotation] = image["annotations"]
        assert annotation["bbox"] == [1, 2, 3, 4.5]
        assert "segmentation" not in annotation


def test_uncompressed_run_lengths_are_compressed(files):
    image, _ = load_coco_dataset(files.write(), files.images)
    mask = mask_util.decode(image["annotations"][0]["segmentation"])
    assert mask.shape == (30, 40) and np.all(mask == 1)


def test_objects_to_be_ignored_are_crowds(files):
    """Some tools write "ignore" in place of iscrowd."""
    content = changed(set_in("annotations", 0, ignore=1))
    for annotation in content["annotations"]:
        annotation.pop("iscrowd", None)
    loaded = load_coco_dataset(files.write(content), files.images)
    flags = [a["iscrowd"] for image in loaded for a in image["annotations"]]
    assert sorted(flags) == [0] * (len(flags) - 1) + [1]


def test_images_of_background_alone_are_data(files):
    path = files.write(changed(lambda c: c.update(annotations=[])))
    register_coco_dataset(files.name, path, files.images)
    assert [image["annotations"] for image in DatasetCatalog.get(files.name)] == [[], []]


def test_registering_twice(files):
    json_file = files.write()
    register_coco_dataset(files.name, json_file, files.images)
    register_coco_dataset(files.name, json_file, files.images)
    assert len(DatasetCatalog.get(files.name)) == 2
    with pytest.raises(DatasetError, match=f"already a data set named '{files.name}'"):
        register_coco_dataset(files.name, files.write(), files.images)
    with pytest.raises(DatasetError, match="already a data set named 'coco_2017_val'"):
        register_coco_dataset("coco_2017_val", json_file, files.images)


def test_unused_classes_are_mentioned(files, caplog):
    content = changed(lambda c: c["categories"].append({"id": 21, "name": "unicorn"}))
    with caplog.at_level(logging.INFO):
        register_coco_dataset(files.name, files.write(content), files.images)
    assert "2 images, 2 annotations, 3 classes: cat, dog, unicorn" in caplog.text
    assert "1 of the 3 classes" in caplog.text and "no annotation: unicorn" in caplog.text


def without(key):
    return lambda c: [a.pop(key) for a in c["annotations"]]


def renumbered(ids):
    return lambda c: [a.update(id=i) for a, i in zip(c["annotations"], ids, strict=True)]


INCOMPLETE = {
    "no area": without("area"),
    "no iscrowd": without("iscrowd"),
    "no id": without("id"),
    "id 0": renumbered([0, 1]),
    "repeated id": renumbered([1, 1]),
    "no info": lambda c: c.pop("info"),
}


@pytest.mark.parametrize("lack", INCOMPLETE)
def test_files_that_coco_evaluation_cannot_read_are_evaluated_all_the_same(files, tmp_path, lack):
    """Perfect predictions must give a perfect AP, whatever optional fields the file lacks."""
    content = changed(INCOMPLETE[lack])
    content["annotations"][1].pop("iscrowd", None)
    if lack != "no iscrowd":
        content["annotations"][1]["iscrowd"] = 0
    register_coco_dataset(files.name, files.write(content), files.images)
    assert not hasattr(MetadataCatalog.get(files.name), "json_file")

    evaluator = COCOEvaluator(files.name, ("bbox",), False, str(tmp_path), use_fast_impl=False)
    evaluator.reset()
    evaluator._predictions = [
        {
            "image_id": image["image_id"],
            "instances": [
                {
                    "image_id": image["image_id"],
                    "category_id": a["category_id"],
                    "bbox": a["bbox"],
                    "score": 0.9,
                }
                for a in image["annotations"]
            ],
        }
        for image in DatasetCatalog.get(files.name)
    ]
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


# What is refused


def set_in(key, index, **values):
    return lambda c: c[key][index].update(values)


FAULTS = {
    "not json": ("{", "is not a JSON file"),
    "binary": ("\x00\x01", "is not a JSON file"),
    "not an object": ("[]", "not in COCO format.*'images'"),
    "predictions": ('[{"image_id": 1}]', "not in COCO format.*'images'"),
    "no images": (lambda c: c.pop("images"), "not in COCO format.*'images'"),
    "no annotations": (lambda c: c.pop("annotations"), "not in COCO format.*'annotations'"),
    "no categories": (lambda c: c.pop("categories"), "not in COCO format.*'categories'"),
    "images as object": (lambda c: c.update(images={}), "not in COCO format.*'images'"),
    "empty images": (lambda c: c.update(images=[]), "lists no images"),
    "empty categories": (lambda c: c.update(categories=[]), "lists no categories"),
    "a string": (lambda c: c["images"].append("a.png"), "number 2 of 'images' is not an object"),
    "only crowds": (set_in("annotations", 0, iscrowd=1), "All 2 annotations .* are crowds"),
    "repeated category id": (
        lambda c: c["categories"].append({"id": 7, "name": "cow"}),
        "category id 7 is used more than once",
    ),
    "repeated class name": (
        set_in("categories", 0, name="cat"),
        "category name 'cat' is used more",
    ),
    "category id as text": (set_in("categories", 0, id="20"), "'dog' has the id '20'"),
    "no class name": (set_in("categories", 0, name=None), "category 20 has no name"),
    "repeated image id": (set_in("images", 0, id=3), "image id 3 is used more than once"),
    "no image id": (set_in("images", 0, id=None), "number 0 of 'images' has the id None"),
    "mixed image ids": (
        lambda c: [c["images"][0].update(id="5"), c["annotations"][1].update(image_id="5")],
        "some are texts, such as '5'",
    ),
    "image id as text": (set_in("annotations", 1, image_id="5"), "'5' .*without quotation marks"),
    "crowd as text": (set_in("annotations", 0, iscrowd="0"), "9 has the iscrowd '0', .* 0 or 1"),
    "area as text": (set_in("annotations", 0, area="1"), "9 has the area '1', it must be a number"),
    "no file name": (set_in("images", 0, file_name=None), "image 5 has no file_name"),
    "no width": (set_in("images", 0, width=None), r"image 5 \(a.png\) has the width None"),
    "zero height": (set_in("images", 1, height=0), r"image 3 \(sub/b.png\) has the height 0"),
    "unknown category": (
        set_in("annotations", 0, category_id=1),
        "1 of 2 annotations have a category_id .* annotation 9 with category_id 1",
    ),
    "no category": (lambda c: c["annotations"][1].pop("category_id"), "annotation 4 with .* None"),
    "unknown image": (set_in("annotations", 1, image_id=77), "annotation 4 with image_id 77"),
    "list as image id": (
        set_in("annotations", 1, image_id=[5]),
        r"annotation 4 with image_id \[5\]",
    ),
    "no box": (lambda c: c["annotations"][1].pop("bbox"), "1 of 2 .* no 'bbox'.*annotation 4"),
    "empty box": (set_in("annotations", 0, bbox=[]), r"no 'bbox'.*annotation 9: \[\]"),
    "null in a box": (set_in("annotations", 0, bbox=[1, None, 2, 3]), "annotation 9"),
    "three numbers": (set_in("annotations", 0, bbox=[1, 2, 3]), "annotation 9"),
    "text in a box": (set_in("annotations", 0, bbox=["1", 2, 3, 4]), "annotation 9"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_in_one_sentence(files, fault):
    change, expected = FAULTS[fault]
    json_file = files.write(change if isinstance(change, str) else changed(change))
    with pytest.raises(DatasetError, match=expected) as caught:
        register_coco_dataset(files.name, json_file, files.images)
    assert json_file in str(caught.value) and "\n" not in str(caught.value)
    assert files.name not in DatasetCatalog


def test_the_name_is_free_after_a_failure(files):
    with pytest.raises(DatasetError):
        register_coco_dataset(files.name, files.write("{"), files.images)
    register_coco_dataset(files.name, files.write(), files.images)
    assert classes_of([files.name]) == ["cat", "dog"]


def test_missing_files(files, tmp_path):
    gone = str(tmp_path / "gone.json")
    with pytest.raises(DatasetError, match="annotation file .*gone.json does not exist"):
        register_coco_dataset(files.name, gone, files.images)
    with pytest.raises(DatasetError, match="annotation file .* does not exist"):
        register_coco_dataset(files.name, files.images, files.images)
    with pytest.raises(
        DatasetError, match="image folder nowhere of data set 'set_.* does not exist"
    ):
        register_coco_dataset(files.name, files.write(), "nowhere")


def test_missing_images(files, tmp_path, caplog):
    content = changed(set_in("images", 1, file_name="gone.png"))
    json_file = files.write(content)
    with pytest.raises(DatasetError, match="1 of 2 images .* the first is gone.png") as caught:
        register_coco_dataset(files.name, json_file, files.images)
    assert files.images in str(caught.value) and json_file in str(caught.value)

    with caplog.at_level(logging.WARNING):
        register_coco_dataset(files.name, json_file, files.images, allow_missing_images=True)
    assert "the first is gone.png" in caplog.text and files.name in DatasetCatalog

    with pytest.raises(DatasetError, match="2 of 2 images"):  # certainly the wrong folder
        register_coco_dataset("other", json_file, str(tmp_path), allow_missing_images=True)


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("https://host/{}", "It is a URL: download the images"),
        ("images/{}", "It is there as {}: write that"),
        ("/data/upload/3/{}", "It is there as {}: write that"),
        ("C:\\photos\\{}", "It is there as {}: write that"),
    ],
)
def test_paths_as_labelling_tools_write_them(files, written, advice):
    name = SOUND["images"][0]["file_name"]
    content = changed(lambda c: c["images"][0].update(file_name=written.format(name)))
    with pytest.raises(DatasetError, match=re.escape(advice.format(name))):
        register_coco_dataset(files.name, files.write(content), files.images)


def test_backslashes_are_named(files):
    content = changed(set_in("images", 1, file_name="sub\\b.png"))
    if os.sep == "/":
        with pytest.raises(DatasetError, match="with slashes in place of backslashes"):
            register_coco_dataset(files.name, files.write(content), files.images)


def test_files_may_begin_with_a_byte_order_mark(files):
    path = files.write("\ufeff" + json.dumps(SOUND))
    register_coco_dataset(files.name, path, files.images)
    assert len(DatasetCatalog.get(files.name)) == len(SOUND["images"])


def test_only_some_images_of_a_large_data_set_are_looked_for(files, monkeypatch):
    monkeypatch.setattr(register_module, "IMAGES_LOOKED_FOR", 4)
    looked_for = []
    monkeypatch.setattr(
        register_module.PathManager, "isfile", lambda path: looked_for.append(path) or True
    )
    images = [{"file_name": f"{i}.png"} for i in range(10)]
    register_module._check_images_exist(images, "x.json", "folder", False)
    assert looked_for == [f"folder/{i}.png" for i in (0, 3, 6, 9)]


def test_nan_in_a_box_is_left_to_the_check_of_annotations(files):
    json_file = files.write(changed(set_in("annotations", 0, bbox=[float("nan"), 1, 2, 3])))
    assert len(read_coco_json(json_file)["annotations"]) == 2


# Classes


def test_classes_of(files):
    register_coco_dataset(files.name, files.write(), files.images)
    assert classes_of([files.name]) == ["cat", "dog"]
    assert classes_of([files.name, files.name]) == ["cat", "dog"]
    assert classes_of([]) is None
    assert len(classes_of(["coco_2017_train", "coco_2017_val"])) == 80


def test_classes_known_only_after_loading(files):
    register_coco_instances(files.name, {}, files.write(), files.images)
    assert not hasattr(MetadataCatalog.get(files.name), "thing_classes")
    assert classes_of([files.name]) == ["cat", "dog"]


def test_a_data_set_without_class_names():
    name = f"set_{uuid4().hex}"
    DatasetCatalog.register(name, lambda: [])
    assert classes_of([name]) is None


def test_an_unregistered_data_set_is_named():
    with pytest.raises(
        DatasetError, match="no data set named 'mine_train'.*--register mine_train="
    ):
        classes_of(["mine_train"])


def classes_registered(classes):
    name = f"set_{uuid4().hex}"
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).thing_classes = classes
    return name


def test_different_classes_are_told_with_both_counts():
    train = classes_registered(["cat", "dog", "cow"])
    val = classes_registered(["cat", "dog"])
    renamed = classes_registered(["cat", "dog", "pig"])
    swapped = classes_registered(["dog", "cat", "cow"])
    check_same_classes([train, classes_registered(["cat", "dog", "cow"])])
    with pytest.raises(DatasetError) as caught:
        check_same_classes([train, val])
    message = str(caught.value)
    assert f"'{train}' has 3" in message and f"'{val}' has 2" in message and "cow" in message
    with pytest.raises(DatasetError, match="only in .*: cow; only in .*: pig"):
        classes_of([train, renamed])
    with pytest.raises(DatasetError, match="class 0 is 'cat' in one and 'dog' in the other"):
        classes_of([train, swapped])
