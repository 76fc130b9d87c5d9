"""A training that is killed, and goes on."""

import os
import signal
import subprocess
import time

import torch

from .training import command, environment, read_metrics, training_cfg, write_rectangles

# Times differ from run to run.
UNREPEATABLE = {"time", "data_time", "rank_data_time", "eta_seconds"}


def losses_by_iteration(lines):
    return {
        line["iteration"]: {k: v for k, v in line.items() if k not in UNREPEATABLE}
        for line in lines
        if "total_loss" in line
    }


def wait_for_iteration(process, folder, iteration):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "The training ended before it could be killed."
        file = folder / "metrics.json"
        if file.exists() and f'"iteration": {iteration},' in file.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(f"Iteration {iteration} was not reached.")


def test_killed_training_goes_on_as_if_it_had_not_been(tmp_path):
    """Losses and weights are those of the uninterrupted training, to the last bit; with dropout,
    augmentation, batch norm's statistics and a worker that loads ahead.

    Metrics are written every 20 iterations, as medians over these 20.
    """
    json_file, images = write_rectangles(tmp_path / "rectangles")
    cfg = training_cfg(
        "rectangles",
        tmp_path,
        *("SOLVER.MAX_ITER", 80, "SOLVER.STEPS", (60,), "SOLVER.CHECKPOINT_PERIOD", 20),
        *("DATALOADER.NUM_WORKERS", 1, "SEED", 11),
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())

    def start(folder, *options):
        return subprocess.Popen(
            command(
                *("--config-file", tmp_path / "config.yaml"),
                *("--register", f"rectangles={json_file}:{images}"),
                *(*options, "OUTPUT_DIR", folder),
            ),
            env=environment(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # So long that it cannot end before it is killed. A power of two times as long, because
    # detectron2's schedule computes with the fraction that is done.
    processes = [start(killed, "SOLVER.MAX_ITER", 80 * 1024), start(whole)]
    try:
        wait_for_iteration(processes[0], killed, 39)
        os.killpg(processes[0].pid, signal.SIGKILL)
        assert processes[0].wait() == -signal.SIGKILL
        assert not (killed / "model_final.pth").exists()
        before_kill = read_metrics(killed)

        processes.append(start(killed, "--resume"))
        assert processes[2].wait(timeout=120) == 0
        assert processes[1].wait(timeout=120) == 0
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    expected = losses_by_iteration(read_metrics(whole))
    assert list(expected) == [19, 39, 59, 79]
    resumed = losses_by_iteration(read_metrics(killed)[len(before_kill) :])
    assert list(resumed) == [i for i in expected if i >= min(resumed)]
    assert min(resumed) > 19
    for iteration, losses in resumed.items():
        assert losses == expected[iteration]

    first, second = (torch.load(folder / "model_final.pth") for folder in (whole, killed))
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
