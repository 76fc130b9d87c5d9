"""Saving is atomic, and what was saved is restored exactly or not at all."""

import inspect
import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detr_d2.checkpoint import DetrCheckpointer
from detr_d2.checkpoint.write import write_atomically
from detr_d2.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def log_reaches_caplog(monkeypatch):
    """detectron2's setup_logger, called by another test, would keep the records from it."""
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)


class Model(nn.Module):
    """As few tensors as the format is recognised by."""

    def __init__(self, queries: int = 4, value: float = 0.0):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.queries = nn.Module()
        self.transformer.queries.position = nn.Embedding(queries, 2)
        nn.init.constant_(self.transformer.queries.position.weight, value)

    @property
    def value(self) -> float:
        return self.transformer.queries.position.weight[0, 0].item()


class Counter:
    """A checkpointable, as the trainer is one."""

    def __init__(self, count: int = 0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def run(script: str, *arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


def test_resume_restores_everything(tmp_path):
    names = ["a", "b"]
    saving = DetrCheckpointer(
        Model(value=3.0), str(tmp_path), class_names=names, config="X: 1\n", trainer=Counter(7)
    )
    saving.save("model_0000007", iteration=7)
    counter, model = Counter(), Model()
    resuming = DetrCheckpointer(model, str(tmp_path), trainer=counter)
    rest = resuming.resume_or_load("", resume=True)
    assert model.value == 3.0 and counter.count == 7
    assert (rest["class_names"], rest["config"], rest["iteration"]) == (names, "X: 1\n", 7)


def test_weights_alone_leave_the_trainer(tmp_path):
    DetrCheckpointer(Model(value=3.0), str(tmp_path), trainer=Counter(7)).save("first")
    counter, model = Counter(), Model()
    checkpointer = DetrCheckpointer(model, str(tmp_path / "other"), trainer=counter)
    checkpointer.resume_or_load(str(tmp_path / "first.pth"), resume=True)
    assert model.value == 3.0 and counter.count == 0


def test_foreign_training_state_is_not_restored(tmp_path):
    """The official script also saves an 'optimizer', which is not ours."""
    state = {"query_embed.weight": torch.full((4, 2), 5.0), "backbone.0.body.x.y": torch.ones(1)}
    torch.save({"model": state, "optimizer": {"count": 9}}, tmp_path / "foreign.pth")
    optimizer, model = Counter(), Model()
    model.register_module("backbone", nn.ModuleDict({"body": nn.ModuleDict({"x": nn.Module()})}))
    model.backbone.body.x.register_buffer("y", torch.zeros(1))
    DetrCheckpointer(model, optimizer=optimizer).load(str(tmp_path / "foreign.pth"))
    assert model.value == 5.0 and optimizer.count == 0


def test_training_does_not_go_on_from_weights_that_do_not_fit(tmp_path):
    DetrCheckpointer(Model(queries=6), str(tmp_path), trainer=Counter(7)).save("model_final")
    counter = Counter()
    checkpointer = DetrCheckpointer(Model(queries=4), str(tmp_path), trainer=counter)
    with pytest.raises(UserError, match="model_final.pth.*do not fit.*--resume"):
        checkpointer.resume_or_load("", resume=True)
    assert counter.count == 0


def test_last_checkpoint_that_is_gone_is_named(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(UserError, match="last_checkpoint.*model_0000009.pth.*does not exist"):
        DetrCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True)
    DetrCheckpointer(Model(), str(tmp_path)).save("model_0000004")
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(UserError, match="names ''.*another .*into it: model_0000004.pth"):
        DetrCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True)


def test_processes_must_find_the_same_checkpoint(tmp_path, monkeypatch):
    """On several machines, each with a folder of its own, they would train from other weights."""
    checkpointer = DetrCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model_0000004")
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, None])
    with pytest.raises(UserError, match="model_0000004.pth, None.*that all of them share"):
        checkpointer.resume_or_load("", resume=True)


def test_another_trainers_training_is_not_gone_on_with(tmp_path):
    """detectron2's holds the state of its trainer under other names."""
    state = {"model": Model().state_dict(), "iteration": 7}
    torch.save(state, tmp_path / "model_0000007.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    with pytest.raises(UserError, match="of this package's training no state .* without --resume"):
        DetrCheckpointer(Model(), str(tmp_path), trainer=Counter()).resume_or_load("", resume=True)


def test_changed_learning_rates_are_said(tmp_path, caplog):
    def checkpointer(rate):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        return DetrCheckpointer(model, str(tmp_path), optimizer=optimizer)

    checkpointer(0.5).save("model_final")
    checkpointer(0.5).resume_or_load("", resume=True)
    assert "learning rates" not in caplog.text
    checkpointer(0.25).resume_or_load("", resume=True)
    assert "learning rates and weight decays [(0.5, 0" in caplog.text
    assert "not with the config's [(0.25, 0" in caplog.text


def test_nothing_to_load_says_so(tmp_path, caplog):
    assert DetrCheckpointer(Model(), str(tmp_path)).load("") == {}
    assert "initial value" in caplog.text


def test_only_the_main_process_writes(tmp_path):
    DetrCheckpointer(Model(), str(tmp_path), save_to_disk=False).save("model_final")
    assert not list(tmp_path.iterdir())


def test_periodic_checkpointer_keeps_the_latest(tmp_path):
    checkpointer = DetrCheckpointer(Model(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=1, max_iter=4, max_to_keep=2)
    for iteration in range(4):
        periodic.step(iteration)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["last_checkpoint", "model_0000002.pth", "model_0000003.pth", "model_final.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")


def test_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("previous")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full.*MiB are free there: make room"):
        write_atomically(str(path), fail)
    assert path.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_in_one_folder_do_not_meet(tmp_path):
    def write(stream):
        stream.write(b"first ")
        write_atomically(str(tmp_path / "b"), lambda other: other.write(b"other"))
        stream.write(b"half")

    write_atomically(str(tmp_path / "a"), write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "first half",
        "b": "other",
    }


def test_kill_in_the_middle_of_a_write(tmp_path):
    """The writer has written half of a new file of the same name when it is killed."""
    DetrCheckpointer(Model(value=1.0), str(tmp_path), trainer=Counter(1)).save("model_final")
    process = run(
        """
        import sys, time
        from detr_d2.checkpoint.write import write_atomically

        def write(stream):
            stream.write(b"half of a checkpoint")
            stream.flush()
            print("writing", flush=True)
            time.sleep(60)

        write_atomically(sys.argv[1], write)
        """,
        str(tmp_path / "model_final.pth"),
    )
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    process.stdout.close()
    model, counter = Model(), Counter()
    DetrCheckpointer(model, str(tmp_path), trainer=counter).resume_or_load("", resume=True)
    assert model.value == 1.0 and counter.count == 1
    # What the killed process left is overwritten, not collected.
    DetrCheckpointer(model, str(tmp_path)).save("model_final")
    assert {path.name for path in tmp_path.iterdir()} == {"last_checkpoint", "model_final.pth"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments(tmp_path):
    """20 children save 4 MB again and again and are killed; each time the last file is whole."""
    process = run(
        """
        import os, random, signal, sys, time
        import torch
        from torch import nn
        from detr_d2.checkpoint import DetrCheckpointer, read_checkpoint

        model = nn.Module()
        model.register_buffer("weight", torch.zeros(1 << 20))
        checkpointer = DetrCheckpointer(model, sys.argv[1])
        checkpointer.save("model_0", iteration=0)

        def save_for_ever(number):
            while True:
                number += 1
                model.weight.fill_(number)
                checkpointer.save(f"model_{number % 2}", iteration=number)

        random.seed(0)
        number = interrupted = progressed = 0
        for _ in range(20):
            child = os.fork()
            if child == 0:
                save_for_ever(number)
            time.sleep(random.uniform(0.02, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            interrupted += any(name.endswith(".unfinished") for name in os.listdir(sys.argv[1]))
            checkpoint = read_checkpoint(checkpointer.get_checkpoint_file())
            (weight,) = checkpoint["model"].values()
            assert bool((weight == checkpoint["iteration"]).all())
            assert checkpoint["iteration"] >= number
            progressed += checkpoint["iteration"] > number
            number = checkpoint["iteration"]
        print(interrupted, progressed)
        """,
        str(tmp_path),
    )
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    interrupted, progressed = map(int, output.split())
    # Otherwise no kill came in the middle of a write, or nothing was ever saved.
    assert interrupted >= 3 and progressed >= 3


def test_only_public_methods_of_the_bases_are_overridden():
    inherited = set(dir(DetectionCheckpointer)) | set(dir(Checkpointer))
    overridden = {name for name in vars(DetrCheckpointer) if name in inherited}
    private = {name for name in overridden if name.startswith("_") and not name.startswith("__")}
    assert not private
    assert {"load", "save", "tag_last_checkpoint"} <= overridden
    for name in ("load", "save", "tag_last_checkpoint"):
        ours = inspect.signature(getattr(DetrCheckpointer, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(Checkpointer, name)).parameters)


def test_file_systems_whose_folders_are_not_synced(tmp_path, monkeypatch):
    """Shared folders of virtual machines, some network mounts."""
    fsync = os.fsync

    def of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write_atomically(str(tmp_path / "file"), lambda file: file.write(b"x"))
    assert (tmp_path / "file").read_bytes() == b"x"


def test_another_optimizer_is_not_gone_on_with(tmp_path):
    model = Model()
    [parameter] = model.parameters()
    DetrCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD([parameter])).save("a")
    groups = [{"params": [parameter]}, {"params": [nn.Parameter(torch.ones(1))]}]
    other = DetrCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD(groups))
    with pytest.raises(UserError, match="a.pth': its optimizer does not fit .*Keep the config"):
        other.resume_or_load("", resume=True)
