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
    _add_test_keys(cfg)
    if "FLOAT32_PRECISION" not in cfg:  # newer versions of detectron2 have it
        # "high": GPUs multiply float32 matrices in TF32, several times as fast.
        cfg.FLOAT32_PRECISION = ""


def get_detr_cfg() -> CfgNode:
    """detectron2's default config with this package's keys, and rasterised masks, as the original
    has them: detectron2's own "polygon" refuses RLE."""
    cfg = get_cfg()
    add_detr_config(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
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

    # Weights of the box losses, and of the same terms in the matching cost.
    detr.GIOU_WEIGHT = 2.0
    detr.L1_WEIGHT = 5.0
    # Losses after every decoder layer instead of the last one only.
    detr.DEEP_SUPERVISION = True
    # Weight of "no object" in the cross-entropy: most queries have no object.
    detr.NO_OBJECT_WEIGHT = 0.1

    # With MODEL.MASK_ON: a pixel of greater probability belongs to the mask.
    cfg.MODEL.MASK_THRESHOLD = 0.5
    # Weights of the masks' focal and dice loss.
    detr.MASK_WEIGHT = 1.0
    detr.DICE_WEIGHT = 1.0
    # Of the masks' logits, in pixels. Below the backbone's finest map, the image itself helps.
    detr.MASK_STRIDE = 4
    # Width of the mask head. 0: HIDDEN_DIM, as in the original.
    detr.MASK_DIM = 0
    # Factor of the mask head's initial weights for attention maps. 1: the original's; 100: for
    # trainings of minutes.
    detr.MASK_ATTENTION_GAIN = 1.0
    # One segment for every pixel. Queries with a lower score are left out, and segments of no more
    # pixels than MIN_AREA.
    detr.PANOPTIC = CfgNode()
    detr.PANOPTIC.ENABLED = False
    detr.PANOPTIC.SCORE_THRESHOLD = 0.85
    detr.PANOPTIC.MIN_AREA = 4

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
    # Backbone maps the encoder sees, from fine to coarse. []: the backbone's last.
    detr.IN_FEATURES = []
    _add_part_keys(detr)
    _add_denoising_keys(detr)

    # Parts whose activations are computed again in the backward pass instead of being kept:
    # "backbone", "encoder", "sampling" (the samples of deformable attention, the largest tensors
    # that such models have). Less memory, a longer step, the same gradients.
    cfg.MODEL.ACTIVATION_CHECKPOINTING = []

    # How --eval-only and the predictor compute, see `optimize_for_inference`. What is found is the
    # same within 1e-3 in float32. "none" runs the model as it was trained.
    cfg.MODEL.INFERENCE = CfgNode()
    # "torch", "openvino", "onnxruntime", or "none".
    cfg.MODEL.INFERENCE.BACKEND = "torch"
    # "float32", "bfloat16", or on a GPU "float16".
    cfg.MODEL.INFERENCE.DTYPE = "float32"
    # Compile the model; every new image size may take minutes.
    cfg.MODEL.INFERENCE.COMPILE = False

    # For MODEL.BACKBONE.NAME build_timm_backbone.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "resnet50"
    # Which of the model's maps to return, from fine to coarse. []: all.
    cfg.MODEL.TIMM.OUT_INDICES = []
    # Let timm load its own weights, downloading them if necessary.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Constant batch norms: the batches of detection are too small to estimate statistics. False:
    # for training from nothing, so that MODEL.BACKBONE.FREEZE_AT freezes nothing, either.
    cfg.MODEL.TIMM.FREEZE_NORM = True

    # For MODEL.BACKBONE.NAME build_basic_resnet_backbone: blocks in res2, res3, …
    cfg.MODEL.BASIC_RESNET = CfgNode()
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [2, 2, 2, 2]


def _add_part_keys(detr: CfgNode) -> None:
    """Which part stands where; combinations.py refuses what makes no sense together."""
    # Of the sine embedding: ratio of the longest to the shortest wave, and what is added to the
    # pixel count (-0.5: the middle of a pixel).
    detr.POSITION_TEMPERATURE = 10000.0
    detr.POSITION_OFFSET = 0.0
    # "single_scale": one map; "multi_scale": all of IN_FEATURES, normed, and then as many coarser
    # ones as NUM_FEATURE_LEVELS still needs. 0: none.
    detr.NECK = "single_scale"
    detr.NUM_FEATURE_LEVELS = 0
    # "plain", or "deformable": each token looks at NUM_POINTS places of every level.
    detr.ENCODER_ATTENTION = "plain"
    # Let each encoder layer scale the position embeddings (DAB-DETR).
    detr.ENCODER_POSITION_SCALE = False
    # Of the feed-forward networks: "relu" or "prelu".
    detr.ACTIVATION = "relu"

    # "learned" positions; "point": with a reference point each; "anchor": learned boxes; "top_k":
    # the encoder's best proposals.
    detr.QUERIES = "learned"
    # What queries start as. "zero", "learned"; for top_k also "memory", the token's features, and
    # "position", made from the box along with a position embedding.
    detr.QUERY_CONTENT = "zero"
    # Linear layers from a query's position to its reference point.
    detr.REFERENCE_LAYERS = 2
    # top_k: rank by one class that stands for any object.
    detr.CLASS_AGNOSTIC_PROPOSALS = False
    # top_k: losses on the proposals of the "chosen" tokens, or of "all".
    detr.SUPERVISED_PROPOSALS = "chosen"
    # Where a query's position embedding comes from. "static": the query brings it; "conditional":
    # that, and its reference point's, scaled by its content; "modulated": its box, scaled by
    # content and size; "box": its box; "padded_box": in the padded image, as DINO's code.
    detr.QUERY_POSITION = "static"
    # "plain", or "separate": projections of their own for content and position.
    detr.SELF_ATTENTION = "plain"
    # "plain", "conditional" or "deformable".
    detr.CROSS_ATTENTION = "plain"
    # Sampling points per head and level of deformable attention.
    detr.NUM_POINTS = 4
    # LayerNorm between each layer's output and the heads.
    detr.DECODER_NORM = True
    # "absolute", or "offset" from the reference point or box.
    detr.BOX_HEAD = "absolute"
    # Smallest distance of a reference from 0 and 1 where its logit is taken.
    detr.REFERENCE_EPS = 1e-5
    # "none"; "detached": a layer's boxes are the next one's references; "look_forward_twice": and
    # gradients flow through one of them.
    detr.REFINEMENT = "none"
    # One head for all decoder layers, or one for each.
    detr.SHARED_HEADS = True
    # "softmax" with "no object"; "sigmoid" with focal loss; "varifocal": sigmoids that also say how
    # good the box is.
    detr.CLASSIFICATION = "softmax"
    # Weight of positives in focal loss and matching cost; negatives have 1 - alpha. "varifocal":
    # of the matching cost and the loss's negatives; its positives are weighted by their IoU.
    detr.FOCAL_ALPHA = 0.25
    # Weight of the classes in loss and matching cost.
    detr.CLASS_WEIGHT = 1.0
    detr.CLASS_COST = 1.0


def _add_denoising_keys(detr: CfgNode) -> None:
    """Ground truth with noise as additional queries, in training only."""
    detr.DENOISING = CfgNode()
    # "none", "dn" (DN-DETR) or "contrastive" (DINO).
    detr.DENOISING.METHOD = "none"
    # dn: how often each object is there. 0: train without, but keep the label embedding.
    detr.DENOISING.NUM_GROUPS = 5
    # contrastive: about how many positives the image with the most objects has. 0: as above.
    detr.DENOISING.NUM_QUERIES = 100
    # Probability that a label is drawn anew; contrastive denoising takes half of it, as DINO does.
    detr.DENOISING.LABEL_NOISE = 0.2
    # dn: largest shift of the centre in halves of the box's size, and largest change of the size as
    # a share of it. contrastive: largest shift of a side, in halves of the box's size; of negatives
    # up to twice that.
    detr.DENOISING.BOX_NOISE = 0.4


def _add_input_keys(cfg: CfgNode) -> None:
    # One choice of MIN_SIZE_TRAIN for all images of a batch. With DATALOADER.ASPECT_RATIO_GROUPING
    # little is left to pad: steps are shorter, the more so the more sizes there are.
    cfg.INPUT.MIN_SIZE_TRAIN_PER_BATCH = False
    # Shorter sides, in pixels, that an image is resized to before it is cropped. []: it is not.
    cfg.INPUT.CROP.RESIZE_SIZES = [400, 500, 600]
    # Brightness, contrast and saturation are multiplied by 1 plus or minus up to this.
    cfg.INPUT.COLOR_JITTER = 0.0
    # What to do with annotations that no detector can learn from (empty boxes, NaN, boxes outside
    # the image): "drop" reports and leaves them out, "error" refuses the data set.
    cfg.INPUT.FAULTY_ANNOTATIONS = "drop"
    # Train on without images that cannot be read, instead of stopping at the first.
    cfg.INPUT.SKIP_UNREADABLE_IMAGES = False


def _add_solver_keys(cfg: CfgNode) -> None:
    # "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the backbone, as a multiple of BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Learning rate of reference points and sampling offsets, as a multiple of BASE_LR.
    cfg.SOLVER.SAMPLING_MULTIPLIER = 1.0
    # Learning rate of the mask head, as a multiple of BASE_LR.
    cfg.SOLVER.MASK_HEAD_MULTIPLIER = 1.0
    # Compile backbone, encoder and decoder for training. The first steps take minutes.
    cfg.SOLVER.COMPILE = False
    # Batches an optimizer step is computed in. SOLVER.IMS_PER_BATCH stays the number of images
    # per step, so a recipe keeps its learning rate on a machine with less memory.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # With SOLVER.AMP.ENABLED: "float16" or "bfloat16"; CPUs have only "bfloat16".
    # "auto": bfloat16, but float16 on GPUs before Ampere, and float32 on CPUs that are slower in
    # bfloat16.
    cfg.SOLVER.AMP.DTYPE = "auto"
    # Length of the training in epochs instead of SOLVER.MAX_ITER, and where the learning rate
    # drops instead of SOLVER.STEPS. None and []: iterations count. The command line comes before
    # the file. Else a MAX_ITER that is not detectron2's default is refused beside EPOCHS, and such
    # a period (CHECKPOINT_PERIOD, EVAL_PERIOD) comes before epochs.
    cfg.SOLVER.EPOCHS = None
    cfg.SOLVER.STEP_EPOCHS = []
    # A checkpoint every so many epochs instead of SOLVER.CHECKPOINT_PERIOD iterations, and how many
    # of them stay. 0: all.
    cfg.SOLVER.CHECKPOINT_EPOCHS = None
    cfg.SOLVER.MAX_CHECKPOINTS = 0


def _add_test_keys(cfg: CfgNode) -> None:
    # Evaluation every so many epochs instead of TEST.EVAL_PERIOD iterations.
    cfg.TEST.EVAL_EPOCHS = None
    # The weights of the evaluation with most of this stay as model_best.pth. "auto": bbox/AP, with
    # masks segm/AP, of panoptic models panoptic_seg/PQ; "": of none.
    cfg.TEST.BEST_METRIC = "auto"
    # COCO's AP counts so many detections of an image and class; published figures are with 100.
    # For images with more objects, along with TEST.DETECTIONS_PER_IMAGE and NUM_OBJECT_QUERIES.
    cfg.TEST.MAX_EVALUATED_DETECTIONS = 100
    # `DetrPredictor` leaves out what has a lower score. Evaluation needs everything.
    cfg.TEST.SCORE_THRESHOLD = 0.0
