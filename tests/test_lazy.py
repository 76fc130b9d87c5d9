"""LazyConfigs give the same model and the same training as yaml."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from omegaconf import OmegaConf

from detr_d2 import model_zoo
from detr_d2.data import classes_of
from detr_d2.engine import lazy, main
from detr_d2.engine.launch import argument_parser
from detr_d2.engine.trainer import best_metric
from detr_d2.errors import UserError

from .training import unregistering, write_rectangles

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = [
    "DigitScenes/detr_tiny",
    "COCO-Detection/detr_R_50_500ep",
    "COCO-PanopticSegmentation/detr_R_50",
]


@pytest.mark.parametrize("name", PAIRS)
def test_same_model_and_recipe(name):
    yaml = model_zoo.get_config(f"{name}.yaml")
    python = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    yaml.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        from_yaml, from_python = build_model(yaml), instantiate(python.model)
    shapes = {name: tensor.shape for name, tensor in from_yaml.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in from_python.state_dict().items()}
    assert str(from_yaml) == str(from_python)

    assert python.optimizer.lr == yaml.SOLVER.BASE_LR
    assert python.optimizer.params.weight_decay == yaml.SOLVER.WEIGHT_DECAY
    assert python.optimizer.params.lr_factor_func.backbone == yaml.SOLVER.BACKBONE_MULTIPLIER
    assert python.train.max_gradient_norm == yaml.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
    assert python.dataloader.train.total_batch_size == yaml.SOLVER.IMS_PER_BATCH
    assert python.train.best_metric == best_metric(yaml)
    if yaml.TEST.EVAL_EPOCHS:
        per_epoch = 118287 / yaml.SOLVER.IMS_PER_BATCH
        periods = python.train.eval_period, python.train.checkpointer.period
        epochs = yaml.TEST.EVAL_EPOCHS, yaml.SOLVER.CHECKPOINT_EPOCHS
        assert python.train.checkpointer.max_to_keep == yaml.SOLVER.MAX_CHECKPOINTS
        assert periods == tuple(pytest.approx(e * per_epoch, abs=2) for e in epochs)
    frozen = yaml.MODEL.DETR.FROZEN_WEIGHTS
    assert python.train.init_checkpoint == (frozen or yaml.MODEL.WEIGHTS)
    assert from_yaml.frozen_detector == from_python.frozen_detector == bool(frozen)
    if yaml.SOLVER.EPOCHS:
        iterations = round(yaml.SOLVER.EPOCHS * 118287 / yaml.SOLVER.IMS_PER_BATCH)
        assert python.train.max_iter == pytest.approx(iterations, abs=2)
        drop = round(yaml.SOLVER.STEP_EPOCHS[0] * 118287 / yaml.SOLVER.IMS_PER_BATCH)
        assert python.lr_multiplier.scheduler.milestones[0] == drop
    else:
        assert python.train.max_iter == yaml.SOLVER.MAX_ITER
        assert list(python.lr_multiplier.scheduler.milestones)[:-1] == list(yaml.SOLVER.STEPS)


@pytest.fixture
def few_digits(tmp_path, monkeypatch):
    """The embedded data sets, small and in a folder of the test's own."""
    from detectron2.data import DatasetCatalog

    from detr_d2.data import (
        digit_panoptic,
        digit_scenes,
        register_digit_panoptic,
        register_digit_scenes,
    )

    for module in (digit_scenes, digit_panoptic):
        monkeypatch.setattr(module, "NUM_TRAIN", 12)
        monkeypatch.setattr(module, "NUM_VAL", 4)
    register_digit_scenes(str(tmp_path))
    register_digit_panoptic(str(tmp_path))
    assert len(DatasetCatalog.get("digit_scenes_train")) == 12
    yield
    register_digit_scenes()
    register_digit_panoptic()


def last_metrics(folder: Path) -> dict:
    lines = (folder / "metrics.json").read_text().splitlines()
    return {k: v for line in lines for k, v in json.loads(line).items()}


def test_same_training_and_evaluation(few_digits, tmp_path):
    torch.manual_seed(0)
    cfg = model_zoo.get_config("DigitScenes/detr_tiny.yaml")
    cfg.MODEL.DEVICE = "cpu"
    weights = tmp_path / "initial.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)

    by_yaml = ["--config-file", str(CONFIGS / "DigitScenes/detr_tiny.yaml")]
    by_yaml += f"""
        OUTPUT_DIR {tmp_path / "yaml"} MODEL.WEIGHTS {weights} SOLVER.MAX_ITER 4 SOLVER.STEPS ()
        SOLVER.WARMUP_ITERS 0 SOLVER.IMS_PER_BATCH 4 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0
        SOLVER.ACCUMULATION_STEPS 2
    """.split()
    main.train_or_evaluate(argument_parser().parse_args(by_yaml))

    by_python = ["--config-file", str(CONFIGS / "DigitScenes/detr_tiny.py")]
    by_python += f"""
        train.output_dir={tmp_path / "python"} train.init_checkpoint={weights} train.max_iter=4
        lr_multiplier.scheduler.milestones=[3,4] lr_multiplier.scheduler.values=[1.0,1.0]
        lr_multiplier.warmup_length=0.0 dataloader.train.total_batch_size=4
        dataloader.train.accumulation_steps=2
        dataloader.train.num_workers=0 dataloader.test.num_workers=0 train.eval_period=0
    """.split()
    lazy.train_or_evaluate(argument_parser().parse_args(by_python))

    yaml, python = last_metrics(tmp_path / "yaml"), last_metrics(tmp_path / "python")
    losses = {name for name in yaml if "loss" in name}
    assert len(losses) == 10
    for name in losses:
        assert yaml[name] == python[name], name
    assert yaml["bbox/AP50"] == pytest.approx(python["bbox/AP50"])
    trained = [torch.load(tmp_path / p / "model_final.pth") for p in ("yaml", "python")]
    for name, tensor in trained[0]["model"].items():
        assert torch.equal(tensor, trained[1]["model"][name]), name

    # And the command goes on from there.
    resumed = argument_parser().parse_args(["--resume", *by_python])
    resumed.opts = [
        o if not o.startswith("train.max_iter") else "train.max_iter=6" for o in resumed.opts
    ]
    lazy.train_or_evaluate(resumed)
    assert last_metrics(tmp_path / "python")["iteration"] == 6

    # An evaluation leaves the training's config alone, and gives the AP again.
    before = (tmp_path / "python" / "config.yaml").read_text()
    weights = f"train.init_checkpoint={tmp_path / 'python' / 'model_final.pth'}"
    evaluated = argument_parser().parse_args(["--eval-only", *by_python, weights])
    results = lazy.train_or_evaluate(evaluated)
    assert results["bbox"]["AP50"] == pytest.approx(last_metrics(tmp_path / "python")["bbox/AP50"])
    assert (tmp_path / "python" / "config.yaml").read_text() == before


def test_masks_and_panoptic_quality(few_digits, tmp_path):
    pytest.importorskip("hotcoco")
    arguments = f"""
        --config-file {CONFIGS / "COCO-PanopticSegmentation/detr_R_50.py"}
        train.output_dir={tmp_path} train.device=cpu train.init_checkpoint="" train.max_iter=2
        lr_multiplier.scheduler.milestones=[1,2] train.eval_period=0
        model.transformer.num_logits=13 model.criterion.num_classes=12
        dataloader.train.dataset.names=["digit_scenes_train_panoptic"]
        dataloader.train.mapper.augmentations.min_size=64
        dataloader.train.total_batch_size=2 dataloader.train.num_workers=0
        model.panoptic.names=["digit_scenes_val_panoptic"]
        dataloader.test.mapper.augmentations.min_size=64 dataloader.test.num_workers=0
    """.split()
    with pytest.raises(UserError, match="frozen_detector needs its weights: name train.init_ch"):
        lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    arguments.append("model.frozen_detector=False")
    results = lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    assert set(results) == {"bbox", "segm", "panoptic_seg"}
    metrics = last_metrics(tmp_path)
    assert metrics["loss_mask"] > 0 and metrics["loss_dice"] > 0
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    assert any(name.startswith("mask_head.") for name in saved)
    assert "loss_ce" in metrics


def test_panoptic_parts_must_be_there():
    config = LazyConfig.load(str(CONFIGS / "COCO-PanopticSegmentation/detr_R_50.py"))
    assert config.dataloader.evaluator.dataset_name == "coco_2017_val_panoptic"
    config.model.mask_head = None
    with torch.device("meta"), pytest.raises(UserError, match="merger, but no mask_head"):
        instantiate(config.model)
    config.model.panoptic.names = ["coco_2017_val"]
    with pytest.raises(UserError, match=r"None of the data sets \(coco_2017_val\) is panoptic"):
        instantiate(config.model.panoptic)


def test_what_cannot_be_evaluated_is_said_before_the_training(few_digits, tmp_path):
    arguments = f"""
        --config-file {CONFIGS / "DigitScenes/detr_tiny.py"} train.output_dir={tmp_path}
        train.max_iter=1 lr_multiplier.scheduler.milestones=[1,2] dataloader.train.num_workers=0
        dataloader.test.dataset.names=["nowhere"]
    """.split()
    with pytest.raises(UserError, match="names is .'nowhere'., and .* 'digit_scenes_val': name"):
        lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    arguments.append("dataloader.evaluator.dataset_name=nowhere")
    with pytest.raises(UserError, match="no data set named 'nowhere'"):
        lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    assert not list(tmp_path.glob("*.pth"))


def test_a_single_name_needs_no_list(few_digits, tmp_path):
    """As in detectron2's own LazyConfigs. Evaluators of data without a COCO file need a folder."""
    arguments = f"""
        --config-file {CONFIGS / "DigitScenes/detr_tiny.py"} train.output_dir={tmp_path}
        dataloader.train.dataset.names=digit_scenes_train
        dataloader.test.dataset.names=digit_scenes_val
    """.split()
    cfg = lazy.setup(argument_parser().parse_args(arguments))
    assert lazy.names_of(cfg.dataloader.train) == ["digit_scenes_train"]
    assert len(instantiate(cfg.dataloader.train.dataset)) == 12
    assert cfg.dataloader.evaluator.output_folder == str(tmp_path / "inference")
    assert lazy.names_of(OmegaConf.create({"dataset": {"file": "a"}})) == []


def test_evaluators_and_loaders_of_detectron2(few_digits, tmp_path):
    """Its evaluator's folder has another name, its loader knows no accumulation."""
    arguments = f"""
        --config-file {CONFIGS / "DigitScenes/detr_tiny.py"} train.output_dir={tmp_path}
        train.max_iter=2 train.eval_period=0 dataloader.test.dataset.names=digit_scenes_val
    """.split()
    cfg = LazyConfig.load(arguments[1])
    cfg.dataloader.evaluator = L(COCOEvaluator)(dataset_name="digit_scenes_val")
    path = tmp_path / "own.yaml"
    cfg.dataloader.train = L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digit_scenes_train"),
        mapper=L(DatasetMapper)(is_train=True, augmentations=[], image_format="RGB"),
        total_batch_size=2,
        num_workers=0,
    )
    LazyConfig.save(cfg, str(path))
    arguments[1] = str(path)
    arguments = argument_parser().parse_args(arguments)
    cfg = lazy.setup(arguments)
    assert cfg.dataloader.evaluator.output_dir == str(tmp_path / "inference")
    assert "AP" in lazy.train(cfg, instantiate(cfg.model), resume=False)["bbox"]
    assert (tmp_path / "model_final.pth").is_file()


def test_boxes_that_are_corners_are_refused_before_a_training(tmp_path):
    """Evaluated on them, the best model would have AP 0."""
    config = LazyConfig.load(str(CONFIGS / "DigitScenes/detr_tiny.py"))
    images = []
    for index in range(8):
        at = {"bbox": [300, 200, 620, 460], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        images.append({"image_id": index, "width": 640, "height": 480, "annotations": [at]})
    config.dataloader.test.dataset.names = "corners"
    with unregistering():
        DatasetCatalog.register("corners", lambda: images)
        with pytest.raises(UserError, match="'corners'"):
            instantiate(config.dataloader.test)


def test_misspelt_keys_are_refused():
    """detectron2 itself would add them, and train with the defaults."""
    config = LazyConfig.load(str(CONFIGS / "DigitScenes/detr_tiny.py"))
    lazy.check_overrides(config, ["train.max_iter=3", "+dataloader.evaluator.extra=1"])
    with pytest.raises(UserError, match="no key 'train.max_iters'"):
        lazy.check_overrides(config, ["train.max_iters=3"])


def test_classes_and_logits_must_agree():
    """Nothing ties the two keys together."""
    config = LazyConfig.load(str(CONFIGS / "DigitScenes/detr_tiny.py"))
    lazy.check_num_classes(config, ["digit_scenes_val"])
    config.model.criterion.num_classes = 3
    message = "num_classes is 3, but .*'digit_scenes_val' has 10 classes: set it to 10, and .* 11,"
    with pytest.raises(UserError, match=message):
        lazy.check_num_classes(config, ["digit_scenes_val"])
    with pytest.raises(UserError, match="has 11 logits, but .* 3 classes need 4: .*num_logits=4"):
        instantiate(config.model)


def test_an_evaluation_needs_no_training_data(few_digits, tmp_path):
    """Nor does it take its classes for those of the data it evaluates on."""
    from detr_d2.checkpoint import DetrCheckpointer

    config = CONFIGS / "DigitScenes/detr_tiny.py"
    model = instantiate(LazyConfig.load(str(config)).model)
    names = classes_of(["digit_scenes_val"])
    DetrCheckpointer(model, str(tmp_path), class_names=names).save("model")
    arguments = f"""
        --eval-only --config-file {config} train.output_dir={tmp_path}
        train.init_checkpoint={tmp_path / "model.pth"} dataloader.test.num_workers=0
        dataloader.train.dataset.names=["nowhere"]
    """.split()
    assert "bbox" in lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("seed", ["null", "-1"])
def test_a_seed_can_be_drawn(few_digits, tmp_path, seed):
    config = CONFIGS / "DigitScenes/detr_tiny.py"
    arguments = f"""
        --config-file {config} train.output_dir={tmp_path} train.seed={seed} train.max_iter=1
        train.eval_period=9 train.log_period=9 train.checkpointer.period=9
        dataloader.train.total_batch_size=1 dataloader.train.num_workers=0
        lr_multiplier.scheduler.milestones=[1,2]
    """.split()
    lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    assert torch.load(tmp_path / "model_final.pth")["trainer"]["seed"] >= 0


def test_own_data_and_the_best_weights(tmp_path):
    """`--register` as of yaml configs; the best evaluation's weights stay, the evaluator's folder
    is the one that is asked for."""
    json_file, images = write_rectangles(tmp_path / "rectangles")
    folder = tmp_path / "results"
    arguments = [
        *("--config-file", str(CONFIGS / "DigitScenes/detr_tiny.py")),
        *("--register", f"mine={json_file}:{images}"),
        *f"""
        train.output_dir={tmp_path / "out"} train.max_iter=3 train.eval_period=2
        train.checkpointer.period=1 train.checkpointer.max_to_keep=2
        lr_multiplier.scheduler.milestones=[2,3] dataloader.train.num_workers=0
        dataloader.train.dataset.names=mine dataloader.test.dataset.names=mine
        dataloader.evaluator.dataset_name=mine dataloader.train.total_batch_size=2
        model.criterion.num_classes=3 model.transformer.num_logits=4
        +dataloader.evaluator.output_folder={folder} dataloader.test.num_workers=0
    """.split(),
    ]
    with unregistering():
        lazy.train_or_evaluate(argument_parser().parse_args(arguments))
    known = json.loads((tmp_path / "out" / "model_best.json").read_text())
    assert known["metric"] == "bbox/AP" and (tmp_path / "out" / "model_best.pth").exists()
    names = sorted(path.name for path in (tmp_path / "out").glob("model_0*"))
    assert names == ["model_0000001.pth", "model_0000002.pth"]
    assert (folder / "per_class_ap.json").exists()


def test_parts_that_do_not_go_together_are_refused_here_too():
    config = LazyConfig.load(str(CONFIGS / "DigitScenes/detr_tiny.py"))
    config.model.transformer.refinement = "detached"
    with pytest.raises(UserError, match="REFINEMENT detached moves references, which BOX_HEAD abs"):
        instantiate(config.model.transformer)
