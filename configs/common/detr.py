"""DETR as a LazyConfig: the model of Base-DETR.yaml, and what training needs around it.

A config imports these and changes what is its own, see detr_R_50_500ep.py.
"""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch.optim import AdamW

from detr_d2.data import DetrDatasetMapper
from detr_d2.data.dataset_mapper import build_augmentation
from detr_d2.data.loader import build_test_dicts, build_train_loader, build_training_dicts
from detr_d2.engine.optimizer import LearningRateFactor
from detr_d2.evaluation import build_evaluator
from detr_d2.modeling import Detr, build_criterion, build_transformer
from detr_d2.modeling.neck import SingleScaleNeck
from detr_d2.modeling.position import SinePositionEmbedding

model = L(Detr)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
        out_features=["res5"],
        freeze_at=2,
    ),
    neck=L(SingleScaleNeck)(
        in_features=["res5"],
        in_channels=2048,
        hidden_dim="${..transformer.hidden_dim}",
        position=L(SinePositionEmbedding)(hidden_dim="${...transformer.hidden_dim}"),
    ),
    transformer=L(build_transformer)(
        num_logits=81,  # classes + 1
        num_queries=100,
        hidden_dim=256,
        num_heads=8,
        dim_feedforward=2048,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dropout=0.1,
    ),
    criterion=L(build_criterion)(num_classes=80, no_object_weight=0.1),
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    detections_per_image=100,
)

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(build_training_dicts)(
            names=["coco_2017_train"],
            num_classes="${model.criterion.num_classes}",
            num_queries="${model.transformer.num_queries}",
        ),
        mapper=L(DetrDatasetMapper)(
            is_train=True,
            augmentations=L(build_augmentation)(
                is_train=True,
                min_size=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
                max_size=1333,
                flip="horizontal",
                crop=("absolute_range", (384, 600)),
            ),
        ),
        seed="${train.seed}",
        total_batch_size=64,
        accumulation_steps=1,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(build_test_dicts)(names=["coco_2017_val"]),
        mapper=L(DetrDatasetMapper)(
            is_train=False,
            augmentations=L(build_augmentation)(is_train=False, min_size=800, max_size=1333),
        ),
        num_workers=4,
    ),
    evaluator=L(build_evaluator)(cfg=None, dataset_name="coco_2017_val"),
)

optimizer = L(AdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is the model, set when training starts
        base_lr=1e-4,
        weight_decay=1e-4,
        lr_factor_func=L(LearningRateFactor)(backbone=0.1),
    ),
    lr=1e-4,
    fused=True,
)

# 500 epochs of 118,287 images, 64 at a time; the learning rate drops after 400.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[739294, 924117]),
    warmup_length=0.0,
    warmup_factor=1.0,
)

train = dict(
    output_dir="./output",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=924117,
    seed=0,
    max_gradient_norm=0.1,
    amp=dict(enabled=False, dtype="auto"),
    float32_precision="",
    checkpointer=dict(period=1848, max_to_keep=5),
    eval_period=18482,
    best_metric="bbox/AP",
    log_period=20,
    device="cuda",
)
