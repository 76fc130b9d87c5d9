"""Two real processes over gloo, started as the tools start them."""

import subprocess
import sys
import time

import pytest
import torch
from detectron2.engine import HookBase, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from detr_d2.engine import DetrTrainer, Precision
from detr_d2.engine.launch import argument_parser, run, run_in_group
from detr_d2.engine.main import setup
from detr_d2.engine.step import accumulate_gradients, distribute, share_statistics

from .helpers import random_inputs, tiny_cfg
from .training import command, environment, read_metrics, training_cfg, write_rectangles

# The second process has no object.
COUNTS = (3, 2, 0, 0)


def call(function: str, *arguments) -> subprocess.CompletedProcess:
    """Calls a function of this file in a process that its children can be told about: they import
    it by the module's name, whichever way pytest has imported it here."""
    script = f"import sys; from tests.test_distributed import *; {function}(*sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def compute_gradients(images_per_batch: int):
    """(gradients by name, losses) of one process's share of the images."""
    torch.manual_seed(0)
    cfg = tiny_cfg("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.DROPOUT", 0.0)
    model = build_model(cfg).train()
    share = len(COUNTS) // comm.get_world_size()
    images = random_inputs([(64, 64)] * 4, COUNTS)[comm.get_rank() * share :][:share]
    batches = [images[i : i + images_per_batch] for i in range(0, share, images_per_batch)]
    losses = accumulate_gradients(distribute(model), batches, Precision("cpu"))
    return {name: p.grad for name, p in model.named_parameters()}, losses


def save_gradients(folder: str) -> None:
    results = [compute_gradients(images_per_batch) for images_per_batch in (2, 1)]
    torch.save(results, f"{folder}/{comm.get_rank()}.pth")


def save_gradients_of_two_processes(folder: str) -> None:
    launch(run_in_group, 2, dist_url="auto", args=(save_gradients, folder))


def test_gradients_are_those_of_one_process(tmp_path):
    """With all images in one batch per process, and accumulated over two."""
    expected, expected_losses = compute_gradients(4)
    largest = max(gradient.abs().max() for gradient in expected.values())
    done = call("save_gradients_of_two_processes", tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    for accumulated in (0, 1):
        for rank in ranks:
            gradients = rank[accumulated][0]
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name
        for name, loss in expected_losses.items():
            mean = (ranks[0][accumulated][1][name] + ranks[1][accumulated][1][name]) / 2
            assert mean.item() == pytest.approx(loss.item(), rel=1e-5), name


@pytest.fixture
def arguments(tmp_path):
    """Command line of a short training on two processes."""
    cfg = training_cfg("rectangles", tmp_path / "out", "DATASETS.TEST", ("rectangles",))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    json_file, images = write_rectangles(tmp_path / "rectangles")
    return [
        *("--config-file", tmp_path / "config.yaml", "--num-gpus", 2, "--dist-url", "auto"),
        *("--register", f"rectangles={json_file}:{images}"),
    ]


def test_train_net_on_two_processes(arguments, tmp_path):
    done = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "4 = 2 process(es) x 1 batch(es) x 2 image(s)" in done.stdout
    [_, trained, evaluated] = read_metrics(tmp_path / "out")
    assert trained["iteration"] == 3 and trained["total_loss"] > 0
    assert evaluated["bbox/AP"] >= 0
    assert (tmp_path / "out" / "model_final.pth").exists()


def test_group_ends_with_its_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    comm.create_local_process_group(1)
    seen = []
    try:
        run_in_group(lambda x: seen.append((x, torch.distributed.is_initialized())), 1)
        assert seen == [(1, True)] and not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def evaluate_other_statistics(folder: str) -> None:
    """Each process has statistics of its own until it evaluates."""
    norm = nn.BatchNorm2d(3)
    nn.init.constant_(norm.running_mean, comm.get_rank() + 1.0)
    share_statistics(nn.Sequential(norm, nn.LayerNorm(3)))
    torch.save(norm.running_mean, f"{folder}/{comm.get_rank()}.pth")


def evaluate_other_statistics_in_two_processes(folder: str) -> None:
    launch(run_in_group, 2, dist_url="auto", args=(evaluate_other_statistics, folder))


def test_all_processes_evaluate_what_is_saved(tmp_path):
    done = call("evaluate_other_statistics_in_two_processes", tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pth").tolist() == [1.0, 1.0, 1.0]


class PoisonLastProcess(HookBase):
    def before_step(self):
        if self.trainer.iter == 2 and comm.get_rank() == 1:
            nn.init.constant_(next(self.trainer.model.module.neck.parameters()), float("nan"))


def train_with_poison(args) -> None:
    trainer = DetrTrainer(setup(args))
    trainer.register_hooks([PoisonLastProcess()])
    trainer.train()


def run_with_poison(*arguments: str) -> None:
    run(train_with_poison, argument_parser().parse_args(arguments))


def test_one_process_that_stops_ends_all(arguments, tmp_path):
    start = time.monotonic()
    done = call("run_with_poison", *arguments, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert time.monotonic() - start < 110  # gloo would wait for half an hour
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Training stopped at iteration 2" in error
    assert "neck.projections.0" in error and "in process 1: " in error
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
