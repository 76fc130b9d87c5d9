"""tools/train_net.py as people type it: their own data, and everything they can get wrong."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from PIL import Image
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from detr_d2 import model_zoo
from detr_d2.checkpoint import DetrCheckpointer
from detr_d2.checkpoint.write import write_checkpoint
from detr_d2.engine import DetrTrainer
from detr_d2.engine.launch import argument_parser, message_for_users, run
from detr_d2.engine.main import (
    load_config,
    load_trained,
    prefer_trained_weights,
    register_datasets,
    train_or_evaluate,
    warn_about_output,
)
from detr_d2.engine.schedule import prefer_periods, resolve_epochs
from detr_d2.errors import UserError
from detr_d2.modeling.meta_arch import Detr
from detr_d2.processor import set_float32_precision

from .helpers import tiny_cfg
from .training import (
    CATEGORIES,
    TRAIN_NET,
    command,
    environment,
    logging_as_before,
    read_metrics,
    training_cfg,
    unregistering,
    write_rectangles,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(train, val) of annotation file and image folder."""
    folder = tmp_path_factory.mktemp("data")
    return (
        write_rectangles(folder / "train"),
        write_rectangles(folder / "val", num_images=4, seed=1),
    )


@pytest.fixture
def config(tmp_path):
    """A config file whose data sets are named `train` and `val`."""
    cfg = training_cfg("train", tmp_path / "out", "DATASETS.TEST", ("val",))
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def register(data):
    """Arguments that register both data sets."""
    return [
        *("--register", "train={}:{}".format(*data[0])),
        *("--register", "val={}:{}".format(*data[1])),
    ]


def call(*arguments):
    """What the script does, in this process; gives the metrics."""
    with unregistering(), logging_as_before():
        return train_or_evaluate(argument_parser().parse_args([str(a) for a in arguments]))


def fail(*arguments) -> str:
    """The one line that the script ends with."""
    with unregistering(), logging_as_before(), pytest.raises(SystemExit) as caught:
        run(train_or_evaluate, argument_parser().parse_args([str(a) for a in arguments]))
    # sys.exit prints text to standard error and makes the exit status 1.
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message and "Traceback" not in message
    return message


# The whole way


def test_own_data_from_annotations_to_ap(config, register, tmp_path):
    """Two `--register`, ids with holes; the weights written give the AP again."""
    arguments = ["--config-file", config, *register]
    done = subprocess.run(
        command(*arguments, "SOLVER.MAX_ITER", 20),
        env=environment(),
        capture_output=True,
        text=True,
        cwd=tmp_path,  # the script does not depend on where it is called
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Registered 'train': 12 images" in done.stdout
    assert "3 classes: red, green, blue" in done.stdout
    out = tmp_path / "out"
    trained = read_metrics(out)[-1]
    detections = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    assert {d["category_id"] for d in detections} <= {1, 4, 7}
    assert len(detections) == 4 * 7  # one for each of 7 queries
    saved = torch.load(out / "model_final.pth")
    assert saved["class_names"] == ["red", "green", "blue"]

    weights = ("MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path / "again")
    metrics = call(*arguments, "--eval-only", *weights)["bbox"]
    again = json.loads((tmp_path / "again/inference/coco_instances_results.json").read_text())
    assert [(d["image_id"], d["category_id"]) for d in again] == [
        (d["image_id"], d["category_id"]) for d in detections
    ]
    for one, other in zip(again, detections, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    for name in ("AP", "AP50", "AP75", "AP-red", "AP-green", "AP-blue"):
        assert metrics[name] == pytest.approx(trained[f"bbox/{name}"], nan_ok=True)


def test_evaluation_of_the_last_checkpoint(config, register, tmp_path):
    arguments = ["--config-file", config, *register]
    call(*arguments, "SOLVER.MAX_ITER", 1)
    metrics = call(*arguments, "--eval-only", "--resume", "MODEL.WEIGHTS", tmp_path / "nothing")
    assert 0 <= metrics["bbox"]["AP"] <= 100


def test_error_of_the_script(config, register, tmp_path, data):
    """A real process: exit status 1, one line on standard error, no traceback anywhere. The
    unreadable image is met by a data loader's worker during the training."""
    [broken] = broken_data(tmp_path)
    options = ("DATALOADER.NUM_WORKERS", 1, "DATASETS.TEST", "()")
    done = subprocess.run(
        command("--config-file", config, "--register", broken, *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: Cannot read the image ") and "2.png" in error
    assert error.endswith("set INPUT.SKIP_UNREADABLE_IMAGES True.")
    assert done.stderr.rstrip().endswith(error)
    assert "Traceback" not in done.stderr + done.stdout
    assert error.removeprefix("error: ").split(":")[0] in (tmp_path / "out/log.txt").read_text()


def broken_data(folder: Path) -> list[str]:
    """--register's argument for a data set with an image that is no image."""
    json_file, images = write_rectangles(folder / "broken", num_images=4)
    Path(images, "2.png").write_bytes(b"no image")
    return [f"train={json_file}:{images}"]


def test_unreadable_image_can_be_skipped(config, tmp_path):
    [broken] = broken_data(tmp_path)
    options = ("DATASETS.TEST", "()", "INPUT.SKIP_UNREADABLE_IMAGES", "True")
    call("--config-file", config, "--register", broken, *options)
    assert (tmp_path / "out" / "model_final.pth").exists()
    assert read_metrics(tmp_path / "out")[-1]["iteration"] == 3


# Configs


def test_missing_config_file(tmp_path):
    path = tmp_path / "nothing.yaml"
    assert f"--config-file {path}: " in fail("--config-file", path)


def test_no_config_file():
    assert "META_ARCHITECTURE is 'GeneralizedRCNN'" in fail()
    assert "--config-file one of the files in configs/" in fail()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL: [1, 2", "while parsing a flow sequence"),
        ("MODEL:\n  DETR:\n    NUM_CLASES: 3\n", "Non-existent config key: MODEL.DETR.NUM_CLASES"),
        ("SOLVER:\n  BASE_LR: fast\n", "SOLVER.BASE_LR"),
        ("_BASE_: nothing.yaml\n", "nothing.yaml"),
        ("VERSION: 99\n", "v99"),
        ("", "must hold keys with values below them"),
        ("- MODEL\n- SOLVER\n", "must hold keys with values below them"),
    ],
)
def test_wrong_config_file(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = fail("--config-file", path)
    assert f"--config-file {path}" in message and expected in message


def test_config_file_cannot_run_code(tmp_path):
    path, target = tmp_path / "config.yaml", tmp_path / "written"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.system ["touch {target}"]\n')
    assert "could not determine a constructor" in fail("--config-file", path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["MODEL.DETR.NUM_CLASES", "3"], "Non-existent key: MODEL.DETR.NUM_CLASES"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
        (["MODEL.DETR.NHEADS.X", "3"], "MODEL.DETR.NHEADS.X goes on below a value"),
        (["MODEL.DETR", "3"], "MODEL.DETR is a group of keys"),
        (["SOLVER.BASE_LR"], "it must be a list of pairs"),
        (["MODEL.DEVICE", "cpu", "--num-gpus", "2"], "--num-gpus must stand before"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'"),
        (["MODEL.BACKBONE.NAME", "nope"], "BACKBONE.NAME is 'nope'; it must be one of build_basic"),
        (["MODEL.META_ARCHITECTURE", "Detrr"], "MODEL.META_ARCHITECTURE is 'Detrr'"),
    ],
)
def test_wrong_override(config, overrides, expected):
    assert expected in fail("--config-file", config, *overrides)


def test_device_is_the_cpu_where_there_is_no_gpu(config, register, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ("MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    call("--config-file", config, *register, *options)
    assert load_config(str(config), ["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["SOLVER.OPTIMIZER", "LION"], "SOLVER.OPTIMIZER is 'LION'"),
        (["SOLVER.LR_SCHEDULER_NAME", "Nope"], "SOLVER is not possible: Unknown LR scheduler"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"], "CLIP_TYPE is 'all'"),
        (["SOLVER.IMS_PER_BATCH", 3, "SOLVER.ACCUMULATION_STEPS", 2], "IMS_PER_BATCH (3)"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"], "float16 needs a GPU"),
        (["DATALOADER.SAMPLER_TRAIN", "Nope"], "SAMPLER_TRAIN is 'Nope'"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["SOLVER.STEP_EPOCHS", "[1]"], "STEP_EPOCHS needs SOLVER.EPOCHS"),
        (["OUTPUT_DIR", "/dev/null/out"], "OUTPUT_DIR '/dev/null/out' cannot be used"),
    ],
)
def test_impossible_setting(config, register, overrides, expected):
    assert expected in fail("--config-file", config, *register, *overrides)


# Data


def test_missing_annotation_file(config, tmp_path):
    missing = tmp_path / "nothing.json"
    message = fail("--config-file", config, "--register", f"train={missing}:{tmp_path}")
    assert f"{missing} does not exist" in message


def test_incomplete_register(config):
    message = fail("--config-file", config, "--register", "train.json")
    assert "NAME=annotations.json:image_dir" in message


def test_unknown_data_set(config):
    message = fail("--config-file", config, "DATASETS.TRAIN", "('nope',)")
    assert "no data set named 'nope'" in message and "--register nope=" in message


def test_data_set_without_objects(config, tmp_path):
    json_file, images = write_rectangles(tmp_path / "empty", num_images=2)
    content = json.loads(Path(json_file).read_text())
    Path(json_file).write_text(json.dumps({**content, "images": [], "annotations": []}))
    message = fail("--config-file", config, "--register", f"train={json_file}:{images}")
    assert json_file in message
    Path(json_file).write_text(json.dumps({**content, "annotations": []}))
    register = ("--register", f"train={json_file}:{images}")
    message = fail("--config-file", config, *register, "DATASETS.TEST", ())
    assert "DATASETS.TRAIN (train) has no object to train on" in message


def test_train_and_val_with_other_classes(config, data, tmp_path):
    categories = [*CATEGORIES, {"id": 9, "name": "grey"}]
    other = write_rectangles(tmp_path / "other", 4, categories=categories)
    message = fail(
        *("--config-file", config, "--register", "train={}:{}".format(*data[0])),
        *("--register", "val={}:{}".format(*other)),
    )
    assert "'train' has 3" in message and "'val' has 4" in message and "grey" in message


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_number_of_classes_in_config_and_data(config, register, mode):
    arguments = ("--config-file", config, *register, *mode, "MODEL.DETR.NUM_CLASSES", 5)
    message = fail(*arguments)
    assert "MODEL.DETR.NUM_CLASSES is 5" in message and "has 3 classes: set it to 3" in message


def test_image_of_another_size(config, tmp_path):
    json_file, images = write_rectangles(tmp_path / "resized", num_images=4)
    for file in Path(images).iterdir():
        Image.new("RGB", (10, 20)).save(file)
    register = ("--register", f"train={json_file}:{images}", "DATASETS.TEST", "()")
    assert "10x20 pixels, its data set says" in fail("--config-file", config, *register)


def test_nothing_to_evaluate_on(config, register):
    message = fail("--config-file", config, *register, "--eval-only", "DATASETS.TEST", "()")
    assert "DATASETS.TEST is empty" in message


# Weights


def test_no_weights_to_evaluate(config, register):
    message = fail("--config-file", config, *register, "--eval-only")
    assert "MODEL.WEIGHTS is empty" in message
    # Whatever else there is would be taken for the last checkpoint.
    arguments = [
        "--eval-only",
        "--resume",
        "MODEL.WEIGHTS",
        ROOT / "configs/DigitScenes/detr_tiny.safetensors",
    ]
    message = fail("--config-file", config, *register, *arguments)
    assert "--resume: there is no checkpoint in" in message and "out' to evaluate" in message


def test_a_new_class_head_is_for_the_start_of_a_training(tmp_path):
    model = build_model(tiny_cfg())
    write_checkpoint(str(tmp_path / "model.pth"), model.state_dict())
    options = ("MODEL.DETR.NEW_CLASS_HEAD", True, "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    loaded = load_trained(tiny_cfg(*options))
    weight = "transformer.decoder.heads.0.class_head.weight"
    assert torch.equal(loaded.state_dict()[weight], model.state_dict()[weight])


def test_images_may_be_missing_only_for_training(monkeypatch):
    registered = {}
    monkeypatch.setattr(
        "detr_d2.engine.main.register_coco_dataset",
        lambda name, *_, allow_missing_images: registered.update({name: allow_missing_images}),
    )
    cfg = tiny_cfg("INPUT.SKIP_UNREADABLE_IMAGES", True, "DATASETS.TEST", ("v",))
    register_datasets(
        ["t=t.json:images", "v=v.json:images"],
        cfg.DATASETS.TEST,
        cfg.INPUT.SKIP_UNREADABLE_IMAGES,
    )
    assert registered == {"t": True, "v": False}


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_missing_weights(config, register, tmp_path, mode):
    path = tmp_path / "nothing.pth"
    message = fail("--config-file", config, *register, *mode, "MODEL.WEIGHTS", path)
    assert f"'{path}' does not exist" in message and "MODEL.WEIGHTS" in message


def test_weights_of_another_model(config, register, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}}, path)
    message = fail("--config-file", config, *register, "MODEL.WEIGHTS", path)
    assert str(path) in message and "fc." in message


def test_weights_of_other_classes(config, register, data, tmp_path):
    """Five unnamed classes do not fit three; both numbers and the key are named."""
    categories = [{"id": i, "name": f"other {i}"} for i in range(1, 6)]
    other = write_rectangles(tmp_path / "other", categories=categories)
    options = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "five")
    call("--config-file", config, "--register", "train={}:{}".format(*other), *options)
    state = torch.load(tmp_path / "five" / "model_final.pth")
    torch.save({"model": state["model"]}, tmp_path / "unnamed.pth")
    for mode in ([], ["--eval-only"]):
        message = fail(
            *("--config-file", config, *register, *mode),
            *("MODEL.WEIGHTS", tmp_path / "unnamed.pth"),
        )
        assert "MODEL.DETR.NUM_CLASSES" in message and "5" in message and "3" in message


def test_diverged(config, register):
    options = ("SOLVER.BASE_LR", "1e20", "SOLVER.WARMUP_ITERS", 0)
    message = fail("--config-file", config, *register, *options)
    assert "Training stopped at iteration 1, learning rate 1e+20" in message


# The script itself


def test_script_is_importable_and_thin(monkeypatch):
    """Importing it, as spawned processes do, starts nothing."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--no-such-argument"])
    spec = importlib.util.spec_from_file_location("train_net_script", TRAIN_NET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.train_or_evaluate is train_or_evaluate
    assert "--register NAME=ANNOTATIONS.json:IMAGE_DIR" in argument_parser("x").format_help()


@pytest.mark.parametrize(("gpus", "machines", "ends"), [(0, 1, 0), (1, 1, 0), (2, 1, 1), (1, 2, 1)])
def test_several_processes_have_a_group_to_end(gpus, machines, ends, monkeypatch):
    seen, ended = [], []
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(
        "detr_d2.engine.launch.launch", lambda main, *_, args, **options: main(*args)
    )
    arguments = argument_parser().parse_args(
        ["--num-gpus", str(gpus), "--num-machines", str(machines)]
    )
    run(seen.append, arguments)
    assert seen == [arguments] and len(ended) == ends


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "--num-gpus is 3, but this machine shows 1 GPU(s)" in fail("--num-gpus", 3)


def test_process_that_is_killed(monkeypatch):
    """By the kernel for lack of memory, say."""

    def launch(*arguments, **options):
        message = "process 1 terminated with signal SIGKILL"
        raise ProcessExitedException(message, 1, 4321, -9, "SIGKILL")

    monkeypatch.setattr("detr_d2.engine.launch.launch", launch)
    assert fail().startswith("error: process 1 terminated with signal SIGKILL (")


def test_bug_in_another_process_keeps_its_traceback(monkeypatch, capsys):
    traceback = "Traceback (most recent call last):\n  File x, line 1\nKeyError: 'a'"

    def launch(*arguments, **options):
        raise ProcessRaisedException(traceback, 0, 4321)

    monkeypatch.setattr("detr_d2.engine.launch.launch", launch)
    assert fail() == "error: KeyError: 'a'"
    assert traceback in capsys.readouterr().err


def test_messages_of_other_processes():
    chain = (
        "Caught UnreadableImageError in DataLoader worker process 0.\n"
        "Original Traceback (most recent call last):\n  File x, line 1\n"
        "PIL.UnidentifiedImageError: no image\n\nThe above exception was the direct cause of the "
        "following exception:\n\nTraceback (most recent call last):\n  File y, line 2\n"
        "detr_d2.data.image.UnreadableImageError: Cannot read a.png (UnidentifiedImage"
        "Error: no image): restore it.\n"
    )
    expected = "Cannot read a.png (UnidentifiedImageError: no image): restore it."
    assert message_for_users(chain) == expected
    assert message_for_users(f"-- Process 1 terminated:\nTraceback: {chain}") == expected
    head = "Traceback (most recent call last):\n  File x, line 1\n"
    assert message_for_users(head + "KeyError: 'detr_d2.x'\n") == ""
    assert message_for_users(head + "AssertionError\n") == ""
    assert message_for_users("detr_d2.errors.UserError: no traceback") == ""
    two_lines = head + "detr_d2.errors.UserError: yaml says:\n  line 3\n"
    assert message_for_users(two_lines) == "yaml says: line 3"


# Iterations and epochs


def test_iterations_on_the_command_line_come_before_epochs_of_the_file():
    base = str(ROOT / "configs" / "Base-DETR.yaml")
    assert load_config(base, []).SOLVER.EPOCHS == 500
    assert load_config(base, ["SOLVER.EPOCHS", "12"]).SOLVER.EPOCHS == 12
    cfg = load_config(base, ["SOLVER.MAX_ITER", "100", "TEST.EVAL_PERIOD", "10"])
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.STEP_EPOCHS, cfg.TEST.EVAL_EPOCHS) == (None, [], None)
    assert cfg.SOLVER.STEPS == ()  # and not detectron2's drop after 30,000
    assert cfg.SOLVER.CHECKPOINT_EPOCHS == 1
    cfg = load_config(base, ["SOLVER.CHECKPOINT_PERIOD", "7"])
    assert (cfg.SOLVER.CHECKPOINT_EPOCHS, cfg.SOLVER.CHECKPOINT_PERIOD) == (None, 7)
    fast = str(ROOT / "configs" / "DigitScenes" / "fast_small.yaml")  # has a period of its own
    cfg = load_config(fast, ["SOLVER.CHECKPOINT_EPOCHS", "2"])
    assert (cfg.SOLVER.CHECKPOINT_EPOCHS, cfg.SOLVER.CHECKPOINT_PERIOD) == (2, 5000)
    cfg = load_config(fast, ["TEST.EVAL_EPOCHS", "2"])
    assert (cfg.TEST.EVAL_EPOCHS, cfg.TEST.EVAL_PERIOD) == (2, 0)
    cfg = load_config(base, ["SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(60,)"])
    assert cfg.SOLVER.STEPS == (60,)
    with pytest.raises(UserError, match="SOLVER.STEPS counts iterations, but SOLVER.EPOCHS is 500"):
        load_config(base, ["SOLVER.STEPS", "(10,)"])


def test_epochs_on_the_command_line_come_before_iterations_of_the_file(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    tiny = str(ROOT / "configs" / "DigitScenes" / "detr_tiny.yaml")
    cfg = prefer_periods(load_config(tiny, ["SOLVER.EPOCHS", "30"]))
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER) == (30, 40000)
    assert "SOLVER.STEPS (13500,) of the file is not used" in caplog.text
    caplog.clear()
    load_config(tiny, ["SOLVER.EPOCHS", "30", "SOLVER.STEP_EPOCHS", "[20]"])
    load_config(str(ROOT / "configs" / "Base-DETR.yaml"), ["SOLVER.EPOCHS", "12"])
    assert "SOLVER" not in caplog.text


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ("tiny", "SOLVER.EPOCHS None TEST.EVAL_EPOCHS None", (16000, None, 2000, None)),
        ("tiny", "TEST.EVAL_EPOCHS None TEST.EVAL_PERIOD 50", (16000, None, 50, None)),
        ("base", "SOLVER.EPOCHS None TEST.EVAL_EPOCHS None", (40000, None, 0, None)),
        ("both", "SOLVER.EPOCHS None SOLVER.STEP_EPOCHS []", (600, None, 0, 10)),
        ("both", "SOLVER.EPOCHS 7 SOLVER.STEP_EPOCHS [5]", (40000, 7, 0, 10)),
        ("both", "SOLVER.MAX_ITER 9", (9, None, 0, 10)),
    ],
)
def test_none_leaves_what_the_file_says(config, overrides, expected, tmp_path):
    base = ROOT / "configs" / "Base-DETR.yaml"
    both = tmp_path / "both.yaml"
    both.write_text(f"_BASE_: {base}\nSOLVER:\n  MAX_ITER: 600\n")
    tiny = ROOT / "configs" / "DigitScenes" / "detr_tiny.yaml"
    file = {"tiny": tiny, "base": base, "both": both}[config]
    cfg = prefer_periods(load_config(str(file), overrides.split()))
    found = cfg.SOLVER.MAX_ITER, cfg.SOLVER.EPOCHS, cfg.TEST.EVAL_PERIOD, cfg.TEST.EVAL_EPOCHS
    assert found == expected
    assert resolve_epochs(cfg, num_images=640).SOLVER.EPOCHS is None


def test_keys_of_other_models_are_named(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    base = str(ROOT / "configs" / "Base-DETR.yaml")
    given = {
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.5",
        "MODEL.RETINANET.NUM_CLASSES": "3",
        "TEST.AUG.ENABLED": "True",
        "TEST.SCORE_THRESHOLD": "0.4",
    }
    file = tmp_path / "own.yaml"  # keys of files count as those of the command line
    file.write_text(f"_BASE_: {base}\nVIS_PERIOD: 20\nMODEL:\n  KEYPOINT_ON: True\n")
    load_config(str(file), [text for pair in given.items() for text in pair])
    messages = [record.getMessage() for record in caplog.records]
    named = sorted(m for m in messages if "is for other models" in m)
    assert [m.split()[0] for m in named] == [
        "MODEL.KEYPOINT_ON",
        "MODEL.RETINANET.NUM_CLASSES",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "TEST.AUG.ENABLED",
        "VIS_PERIOD",
    ]
    assert "give MODEL.DETR.NUM_CLASSES" in named[1] and "give TEST.SCORE_THRESHOLD" in named[2]
    assert named[3] == "TEST.AUG.ENABLED is for other models, it changes nothing here."


def test_float32_precision_is_set(monkeypatch):
    """On GPUs with TF32; detectron2's newer versions have the same key."""
    given = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", given.append)
    for precision in ("", "high"):
        set_float32_precision(precision)
    assert given == ["high"]
    with pytest.raises(UserError, match="FLOAT32_PRECISION is 'tf32'; it must be"):
        set_float32_precision("tf32")


def test_expected_results_are_verified(config, register, tmp_path):
    """detectron2's TEST.EXPECTED_RESULTS; what is not reached ends the program."""
    options = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    call("--config-file", config, *register, *options)
    weights = ("MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth")
    evaluate = ("--config-file", config, *register, "--eval-only", *weights)
    call(*evaluate, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 0.0, 100.0]]")
    with pytest.raises(SystemExit):
        call(*evaluate, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 300.0, 1.0]]")


def test_evaluation_takes_the_trained_weights_of_the_zoo():
    """`--eval-only --config-file configs/COCO-Detection/…` is all one has to type."""
    tiny = ROOT / "configs" / "DigitScenes" / "detr_tiny.yaml"
    assert model_zoo.trained_weights(str(tiny)).endswith("detr_tiny.safetensors")
    official = model_zoo.trained_weights(str(ROOT / "configs/COCO-Detection/detr_R_50_500ep.yaml"))
    assert official.startswith("https://")
    assert model_zoo.trained_weights(str(ROOT / "configs" / "Base-DETR.yaml")) is None
    assert model_zoo.trained_weights("elsewhere/detr_tiny.yaml") is None


def test_tools_that_do_not_train_take_the_trained_weights():
    tiny = str(ROOT / "configs" / "DigitScenes" / "detr_tiny.yaml")
    for overrides, expected in (([], "detr_tiny.safetensors"), (["MODEL.WEIGHTS", "a"], "a")):
        cfg = load_config(tiny, overrides)
        prefer_trained_weights(cfg, tiny, overrides[::2])
        assert cfg.MODEL.WEIGHTS.endswith(expected)


def test_a_backbone_is_not_evaluated(config, register, tmp_path):
    cfg = load_config(str(config), ["MODEL.DETR.NUM_CLASSES", "3"])
    state = build_model(cfg).backbone.state_dict()
    path = tmp_path / "backbone.pth"
    torch.save({"model": {f"backbone.{name}": tensor for name, tensor in state.items()}}, path)
    message = fail("--config-file", config, *register, "--eval-only", "MODEL.WEIGHTS", path)
    assert "backbone without a trained transformer" in message


# The output folder


def test_an_evaluation_leaves_config_and_log_of_the_training(config, register, tmp_path):
    options = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    call("--config-file", config, *register, *options)
    saved = tmp_path / "out" / "config.yaml"
    before, log = saved.read_text(), (tmp_path / "out" / "log.txt").read_text()
    assert "MAX_ITER: 1\n" in before and f"NUM_CLASSES: {len(CATEGORIES)}" in before
    weights = ("MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth")
    call("--config-file", config, *register, "--eval-only", *weights)
    assert saved.read_text() == before
    assert (tmp_path / "out" / "inference" / "config.yaml").exists()
    assert (tmp_path / "out" / "log.txt").read_text() == log
    assert "detr_d2" in (tmp_path / "out" / "inference" / "log.txt").read_text()


def test_the_state_of_the_output_folder_is_said(tmp_path, caplog):
    checkpointer = DetrCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    warn_about_output(checkpointer, resume=False)
    assert not caplog.messages
    warn_about_output(checkpointer, resume=True)
    assert "there is no checkpoint in" in caplog.messages.pop()
    checkpointer.save("model")
    caplog.clear()
    warn_about_output(checkpointer, resume=True)
    assert not caplog.messages
    warn_about_output(checkpointer, resume=False)
    assert "holds checkpoints of another training" in caplog.messages.pop()


def test_other_missing_files_keep_their_traceback():
    """Of a script's own: what it looked for is not a data set."""
    with pytest.raises(FileNotFoundError, match="my_own_labels"):
        run(lambda args: os.stat("/nowhere/my_own_labels.txt"), argument_parser().parse_args([]))


def test_a_trainer_and_a_model_of_ones_own(config, register, tmp_path):
    """As the README's script has it; a model derived from Detr keeps its name in the config."""

    class OwnDetr(Detr):
        pass

    class Trainer(DetrTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            built.append(cls)
            return super().build_train_loader(cfg)

    built = []
    META_ARCH_REGISTRY.register(OwnDetr)
    options = ["MODEL.META_ARCHITECTURE", "OwnDetr", "SOLVER.MAX_ITER", "2"]
    arguments = ["--config-file", config, *register, *options, "OUTPUT_DIR", str(tmp_path)]
    with unregistering():
        run(
            partial(train_or_evaluate, trainer_class=Trainer),
            argument_parser().parse_args(list(map(str, arguments))),
        )
    assert built == [Trainer] and (tmp_path / "model_final.pth").is_file()
    with pytest.raises(UserError, match="'GeneralizedRCNN', this script trains 'Detr' and what"):
        load_config(str(config), ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])


def test_missing_files_of_a_built_in_data_set(config, register, monkeypatch, tmp_path):
    message = fail(
        *("--config-file", config, "DATASETS.TRAIN", "('coco_2017_train',)"),
        *("DATASETS.TEST", "()", "MODEL.DETR.NUM_CLASSES", 80),
    )
    assert "instances_train2017.json" in message and "DETECTRON2_DATASETS" in message


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_missing_files_are_no_fault_of_the_output_folder(config, mode, tmp_path):
    """Classes that are known only when the data is loaded, here to settle how many there are."""
    name = "annotations_missing"
    with unregistering():
        load = partial(load_coco_json, str(tmp_path / "missing.json"), str(tmp_path), name)
        DatasetCatalog.register(name, load)
        names = ("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)")
        message = fail("--config-file", config, *mode, *names)
    assert "missing.json" in message and "OUTPUT_DIR" not in message
