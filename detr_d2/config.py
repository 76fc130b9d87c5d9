"""Every key that this package adds to detectron2's config."""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg


def add_detr_config(cfg: CfgNode) -> None:
    """Adds the keys of DETR to a detectron2 config, in place.

    Names and defaults are those of the original DETR's detectron2 wrapper wherever it has them,
    so its yaml files load unchanged.
    """
    _add_model_keys(cfg)
    _add_input_keys(cfg)
    _add_solver_keys(cfg)


def get_detr_cfg() -> CfgNode:
    """detectron2's default config with this package's keys."""
    cfg = get_cfg()
    add_detr_config(cfg)
    return cfg


def _add_model_keys(cfg: CfgNode) -> None:
    cfg.MODEL.DETR = CfgNode()
    detr = cfg.MODEL.DETR

    # Number of classes, without "no object". 0: as many as the first training data set has.
    # The published COCO weights have 91 (category ids up to 90, with holes).
    detr.NUM_CLASSES = 0
    # Start every class anew where MODEL.WEIGHTS has a class head. Needed for weights with another
    # number of classes that do not tell their names.
    detr.NEW_CLASS_HEAD = False
    # For training masks on a frozen detector: a checkpoint of that detector.
    detr.FROZEN_WEIGHTS = ""

    # Weights of the losses; the matching costs have the same (class: 1).
    detr.GIOU_WEIGHT = 2.0
    detr.L1_WEIGHT = 5.0
    # Losses after every decoder layer instead of the last one only.
    detr.DEEP_SUPERVISION = True
    # Weight of "no object" in the cross-entropy: most queries have no object.
    detr.NO_OBJECT_WEIGHT = 0.1

    # Transformer.
    detr.NHEADS = 8
    detr.DROPOUT = 0.1
    detr.DIM_FEEDFORWARD = 2048
    detr.ENC_LAYERS = 6
    detr.DEC_LAYERS = 6
    # LayerNorm before each sub-layer instead of after it.
    detr.PRE_NORM = False
    detr.HIDDEN_DIM = 256
    # At least the largest number of objects in an image; every image gets as many predictions.
    detr.NUM_OBJECT_QUERIES = 100
    # "sine" or "learned" (at most 50x50 tokens).
    detr.POSITION_EMBEDDING = "sine"
    # Backbone map the encoder sees, as a list of one name. []: the backbone's last.
    detr.IN_FEATURES = []

    # For MODEL.BACKBONE.NAME build_timm_backbone.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "resnet50"
    # Which of the model's maps to return, from fine to coarse. []: all.
    cfg.MODEL.TIMM.OUT_INDICES = []
    # Let timm load its own weights, downloading them if necessary.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Constant batch norms: the batches of detection are too small to estimate statistics.
    cfg.MODEL.TIMM.FREEZE_NORM = True

    # For MODEL.BACKBONE.NAME build_basic_resnet_backbone: blocks in res2, res3, …
    cfg.MODEL.BASIC_RESNET = CfgNode()
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [2, 2, 2, 2]


def _add_input_keys(cfg: CfgNode) -> None:
    # What to do with annotations that no detector can learn from (empty boxes, NaN, boxes outside
    # the image): "drop" reports and leaves them out, "error" refuses the data set.
    cfg.INPUT.FAULTY_ANNOTATIONS = "drop"
    # Rasterised masks, as in the original. detectron2's default, "polygon", refuses RLE.
    cfg.INPUT.MASK_FORMAT = "bitmask"
    # Train on without images that cannot be read, instead of stopping at the first.
    cfg.INPUT.SKIP_UNREADABLE_IMAGES = False


def _add_solver_keys(cfg: CfgNode) -> None:
    # "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the backbone, as a multiple of BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Batches an optimizer step is computed in. SOLVER.IMS_PER_BATCH stays the number of images
    # per step, so a recipe keeps its learning rate on a machine with less memory.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # With SOLVER.AMP.ENABLED: "float16" or "bfloat16"; CPUs have only "bfloat16".
    # "auto": float16 on CUDA as in detectron2, bfloat16 elsewhere.
    cfg.SOLVER.AMP.DTYPE = "auto"
    # Length of the training in epochs instead of SOLVER.MAX_ITER, and where the learning rate
    # drops instead of SOLVER.STEPS. None and []: iterations count.
    cfg.SOLVER.EPOCHS = None
    cfg.SOLVER.STEP_EPOCHS = []
    # Evaluation every so many epochs instead of TEST.EVAL_PERIOD iterations.
    cfg.TEST.EVAL_EPOCHS = None
