"""Data loaders whose random choices depend only on the seed and the place in the stream.

detectron2's own training loader starts its stream anew when a training is resumed. This one can
start anywhere in it: batch n is the same, with the same augmentation, whether or not the training
was interrupted before and however many workers load it.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .annotations import (
    check_annotations,
    refuse_xyxy_given_as_xywh,
    report_faulty_annotations,
)
from .classes import resolve_num_classes
from .dataset_mapper import DetrDatasetMapper
from .register import load_dataset, missing_file
from .segments import check_segment_classes, listed_objects

logger = logging.getLogger(__name__)


def derive_seed(*numbers: int) -> int:
    """An independent 63-bit seed for each tuple of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededDataset(Dataset):
    """Maps dataset dictionaries with random numbers that depend only on (seed, position). Their
    "batch_seed" is the same for all images of a batch, in all processes."""

    def __init__(self, dataset: Sequence[dict], mapper: Callable[[dict], Any], seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: tuple[int, int, int]) -> dict[str, Any]:
        """(index in the data set, position in the stream of all processes, number of the batch) ->
        model input.

        Raises:
            UserError: the mapper refused a hundred images in a row.
        """
        index, position, batch = sample
        seed = derive_seed(self.seed, position)
        batch_seed = derive_seed(self.seed, batch, 0)  # a third number: no position's seed
        # In the main process (no workers) the model's own random numbers must not be disturbed.
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPU
            try:
                for _ in range(100):
                    mapped = self.mapper({**self.dataset[index], "batch_seed": batch_seed})
                    if mapped is not None:
                        return mapped
                    index = random.randrange(len(self.dataset))
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        raise UserError("100 images in a row could not be used: check the data set's image folder.")


class ResumableBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """Endless batches of (index, position in the stream, number of the batch), from batch
    `start_batch` on."""

    def __init__(self, indices: Iterable[int], batch_size: int, groups: Sequence[int]):
        """
        Args:
            indices: this process's endless, reproducible stream of data set indices.
            groups: one number per data set entry; a batch has images of one group only.
        """
        self.indices = indices
        self.batch_size = batch_size
        self.groups = groups
        self.start_batch = 0

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for number, batch in islice(enumerate(self._batches()), self.start_batch, None):
            yield [(index, position, number) for index, position in batch]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        waiting = defaultdict(list)
        for step, index in enumerate(self.indices):
            batch = waiting[self.groups[index]]
            batch.append((index, step * world_size + rank))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()


def _train_loader_from_config(
    cfg: CfgNode, seed: int, mapper: Callable[[dict], Any] | None = None
) -> dict[str, Any]:
    return {
        "dataset": build_training_dicts(cfg),
        "mapper": mapper or DetrDatasetMapper(cfg, is_train=True),
        "seed": seed,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "accumulation_steps": cfg.SOLVER.ACCUMULATION_STEPS,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "sampler": cfg.DATALOADER.SAMPLER_TRAIN,
        "repeat_threshold": cfg.DATALOADER.REPEAT_THRESHOLD,
        "repeat_sqrt": cfg.DATALOADER.get("REPEAT_SQRT", True),
    }


@configurable(from_config=_train_loader_from_config)
def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], Any],
    seed: int,
    total_batch_size: int,
    accumulation_steps: int = 1,
    num_workers: int = 0,
    aspect_ratio_grouping: bool = False,
    sampler: str = "TrainingSampler",
    repeat_threshold: float = 0.0,
    repeat_sqrt: bool = True,
) -> DataLoader:
    """The training loader; one item is the batch of one forward pass of one process.

    Args:
        dataset: dictionaries in detectron2's standard format.
        mapper: dictionary -> model input.
        seed: the same on all processes.
        total_batch_size: images per optimizer step, on all processes together.
        accumulation_steps: forward passes per optimizer step.
        aspect_ratio_grouping: batches of images that are all upright or all wide.
        sampler: "TrainingSampler", or "RepeatFactorTrainingSampler" with `repeat_threshold` and
            `repeat_sqrt`, which repeats images of rare classes (LVIS).

    Raises:
        UserError: the batch cannot be divided as asked, an unknown sampler, or images whose shape
            nobody tells are to be grouped by it.
    """
    if sampler == "TrainingSampler":
        indices = TrainingSampler(len(dataset), seed=seed)
    elif sampler == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            [{"annotations": listed_objects(d) or []} for d in dataset],
            repeat_threshold,
            **({} if repeat_sqrt else {"sqrt": False}),  # older detectron2s have no such argument
        )
        indices = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {sampler!r}; it must be TrainingSampler or "
            "RepeatFactorTrainingSampler."
        )
    batch_size = images_per_forward(total_batch_size, accumulation_steps)
    if aspect_ratio_grouping and any("width" not in d or "height" not in d for d in dataset):
        raise UserError(
            "The data set does not tell its images' width and height (detectron2's panoptic and "
            "semantic ones do not): set DATALOADER.ASPECT_RATIO_GROUPING False."
        )
    groups = [int(aspect_ratio_grouping and d["width"] > d["height"]) for d in dataset]
    return DataLoader(
        SeededDataset(DatasetFromList(dataset, copy=False), mapper, seed),
        batch_sampler=ResumableBatchSampler(indices, batch_size, groups),
        num_workers=num_workers,
        collate_fn=list,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable:
    """detectron2's evaluation loader with this package's mapper; see `build_test_dicts`."""
    return build_detection_test_loader(
        build_test_dicts(dataset_name),
        mapper=DetrDatasetMapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_dicts(names: str | Sequence[str]) -> list[dict]:
    """Dictionaries of a data set to evaluate on, with the images that have no object. Annotations
    that cannot be found are named in a warning.

    Raises:
        FaultyAnnotationError: the boxes are corners labelled as width and height, so that the
            evaluation of a perfect model would say 0.
    """
    names = [names] if isinstance(names, str) else list(names)
    try:
        dataset = get_detection_dataset_dicts(names, filter_empty=False)
    except FileNotFoundError as error:
        raise missing_file(error) from error
    if dataset and all(d.get("annotations") == [] for d in dataset):
        logger.warning(f"The data set {', '.join(names)} has no object: it gives no AP.")
    refuse_xyxy_given_as_xywh(dataset, ", ".join(names))
    report_faulty_annotations(dataset, ", ".join(names))
    return dataset


def _training_dicts_from_config(cfg: CfgNode) -> dict[str, Any]:
    return {
        "names": cfg.DATASETS.TRAIN,
        "num_classes": resolve_num_classes(cfg),
        "num_queries": cfg.MODEL.DETR.NUM_OBJECT_QUERIES,
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "faulty_annotations": cfg.INPUT.FAULTY_ANNOTATIONS,
        "masks": cfg.MODEL.MASK_ON,
    }


@configurable(from_config=_training_dicts_from_config)
def build_training_dicts(
    names: str | Sequence[str],
    *,
    num_classes: int,
    num_queries: int,
    filter_empty: bool = False,
    faulty_annotations: str = "drop",
    masks: bool = False,
) -> list[dict]:
    """Dictionaries of the training data sets, with their annotations checked.

    Args:
        names: of registered data sets, or of one.
        num_classes, faulty_annotations, masks: see `check_annotations`.
        num_queries: of the model, for a warning about images with more objects.
        filter_empty: leave out images without objects.

    Raises:
        UserError: nothing to train on, or annotations that cannot be used.
    """
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name at least one data set to train on.")
    names = [names] if isinstance(names, str) else names
    dataset_dicts = []
    for name in names:
        dataset_dicts += check_annotations(
            load_dataset(name), faulty_annotations, name, num_classes=num_classes, masks=masks
        )
    check_segment_classes(dataset_dicts, num_classes)
    if filter_empty:
        dataset_dicts = filter_empty_images(dataset_dicts)
    if not dataset_dicts:
        raise UserError(f"DATASETS.TRAIN ({', '.join(names)}) has no image to train on.")
    if not any(listed is None or listed for listed in map(listed_objects, dataset_dicts)):
        raise UserError(f"DATASETS.TRAIN ({', '.join(names)}) has no object to train on.")
    warn_of_few_queries(dataset_dicts, num_queries)
    return dataset_dicts


def filter_empty_images(dataset_dicts: Sequence[dict]) -> list[dict]:
    """The images with an object that is no crowd, and those that only a semantic picture tells of:
    which of these are empty takes opening them all."""
    kept = [
        d
        for d in dataset_dicts
        if (listed := listed_objects(d)) is None or any(not x.get("iscrowd", 0) for x in listed)
    ]
    logger.info(
        "Left out %d images without objects of %d.",
        len(dataset_dicts) - len(kept),
        len(dataset_dicts),
    )
    return kept


def warn_of_few_queries(dataset_dicts: Sequence[dict], num_queries: int) -> None:
    """Objects beyond the number of queries can never be detected."""
    counts = [
        sum(not listed.get("iscrowd", 0) for listed in listed_objects(d) or ())
        for d in dataset_dicts
    ]
    crowded = sum(count > num_queries for count in counts)
    if crowded:
        logger.warning(
            f"{crowded} of {len(counts)} images have more objects (up to {max(counts)}) than the "
            f"model has queries: raise MODEL.DETR.NUM_OBJECT_QUERIES, now {num_queries}, and "
            "TEST.DETECTIONS_PER_IMAGE with it."
        )


def images_per_forward(total_batch_size: int, accumulation_steps: int) -> int:
    """Images of one process in one forward pass.

    Raises:
        UserError: the images of a step do not divide evenly.
    """
    world_size = comm.get_world_size()
    if accumulation_steps < 1:
        raise UserError(f"SOLVER.ACCUMULATION_STEPS is {accumulation_steps}; it must be 1 or more.")
    images, rest = divmod(total_batch_size, world_size * accumulation_steps)
    if rest or images < 1:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH ({total_batch_size}) must be a multiple of the number of "
            f"processes ({world_size}) times SOLVER.ACCUMULATION_STEPS ({accumulation_steps})."
        )
    return images
