"""A fit that is killed goes on from its checkpoints, to the very same end."""

import gc
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpyro.infer.svi import SVIState
from resumable import BATCH, SAVE_EVERY, fit

from checks import assert_equal
from numpyro_dynamic_subsample.__main__ import newest

SCRIPT = Path(__file__).with_name("resumable.py")

# orbax leaves coroutines behind when it cannot read an array.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    gc.collect()


def kill_at(step, directory):
    command = [sys.executable, SCRIPT, directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert f"{step}\n" in process.stdout
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_killed_fit_ends_as_the_uninterrupted_one(tmp_path, capsys):
    state, losses = fit(tmp_path / "whole", np.arange(BATCH))
    step = int(np.random.default_rng(7).integers(3 * SAVE_EVERY, len(losses) // 2))
    killed, cut = tmp_path / "killed", tmp_path / "cut"
    kill_at(step, killed)
    *_, before, last = steps_in(killed)
    shutil.copytree(killed, cut)
    cut_short(max(files_in(cut / str(last)), key=lambda file: file.stat().st_size))
    capsys.readouterr()
    for directory, done in [(killed, last), (cut, before)]:
        # The guide is built anew, from a first batch of another size.
        resumed, of_rest = fit(directory, np.arange(5))
        assert of_rest == losses[done:]
        assert_equal(resumed, state)
        refusal = f"Checkpoint {last} in {directory} is damaged: "
        assert (refusal in capsys.readouterr().out) == (directory is cut)
        assert steps_in(directory)[-1] == len(losses)


def state_at(step):
    return SVIState({"z": step + jnp.arange(1000.0)}, None, jax.random.key(step))


CONTENTS = ocp.args.StandardRestore(state_at(0))


@pytest.fixture
def directory(tmp_path):
    with ocp.CheckpointManager(tmp_path / "saved") as saved:
        for step in (1, 2):
            saved.save(step, args=ocp.args.StandardSave(state_at(step)))
    return tmp_path / "saved"


def test_cut_checkpoint_is_refused_or_right(directory, capsys):
    refused = 0
    for path in files_in(directory / "2"):
        copy = directory.with_name(path.name)
        shutil.copytree(directory, copy)
        cut_short(copy / path.relative_to(directory))
        with ocp.CheckpointManager(copy) as saved:
            step, restored = newest(saved, CONTENTS)
            assert_equal(restored, state_at(step))
        shutil.rmtree(copy)
        refused += step == 1
    assert capsys.readouterr().out.count("Checkpoint 2 in ") == refused > 1


def test_checkpoints_that_cannot_be_read_are_an_error(directory):
    for path in files_in(directory):
        cut_short(path)
    with ocp.CheckpointManager(directory) as saved:
        with pytest.raises(SystemExit, match="^Remove .*saved: no checkpoint"):
            newest(saved, CONTENTS)


def test_nothing_to_resume_from(tmp_path):
    with ocp.CheckpointManager(tmp_path) as saved:
        assert newest(saved, CONTENTS) == (0, None)
