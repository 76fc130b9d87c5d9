# The model and recipe of detr_tiny.yaml as a LazyConfig.
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from detr_d2.modeling.backbone import make_basic_stages

from ..common.detr import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=32, norm="BN"),
    stages=L(make_basic_stages)(in_channels=32, out_channels=32, blocks=[2, 2, 2], norm="BN"),
    out_features=["res4"],
)
model.neck.update(in_features=["res4"], in_channels=128)
model.transformer.update(
    num_logits=11,
    num_queries=20,
    hidden_dim=128,
    num_heads=4,
    dim_feedforward=512,
    num_encoder_layers=3,
    num_decoder_layers=3,
    dropout=0.0,
)
model.criterion.num_classes = 10

dataloader.train.dataset.names = ["digit_scenes_train"]
dataloader.train.mapper.augmentations.update(
    min_size=[96, 112, 128, 144], max_size=224, flip="none", crop=None
)
dataloader.train.update(total_batch_size=16, num_workers=1)
dataloader.test.dataset.names = ["digit_scenes_val"]
dataloader.test.mapper.augmentations.update(min_size=160, max_size=224)
dataloader.test.num_workers = 1
dataloader.evaluator.dataset_name = "digit_scenes_val"

optimizer.lr = 3e-4
optimizer.params.base_lr = 3e-4
optimizer.params.lr_factor_func.backbone = 1.0

lr_multiplier.update(warmup_length=500 / 16000, warmup_factor=0.001)
lr_multiplier.scheduler.milestones = [13500, 16000]

train.update(init_checkpoint="", max_iter=16000, seed=1, eval_period=2000)
train.amp.enabled = True
train.checkpointer.period = 2000
