"""A fit that is killed goes on from its checkpoints, to the very same end."""

import gc
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpyro.infer.svi import SVIState

from checks import assert_equal, assert_prints
from numpyro_dynamic_subsample.__main__ import newest
from numpyro_dynamic_subsample.examples import resumable
from numpyro_dynamic_subsample.examples.resumable import SAVE_EVERY, fit

# orbax leaves coroutines behind when it cannot read an array.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    gc.collect()


def kill_at(step, directory):
    """Run the example until it prints a step, and return what it has printed."""
    command = [sys.executable, "-m", resumable.__name__, directory]
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                printed.append(line)
                if line.startswith(f"step {step}:"):
                    break
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    return "".join(printed)


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_killed_fit_ends_as_the_uninterrupted_one(tmp_path, capsys):
    state, losses = fit(tmp_path / "whole")
    capsys.readouterr()
    killed = tmp_path / "killed"
    first = kill_at(SAVE_EVERY + 3, killed)
    step = int(np.random.default_rng(7).integers(3 * SAVE_EVERY, len(losses) // 2))
    assert_prints(resumable, first, kill_at(step, killed))
    done = steps_in(killed)[-1]
    assert SAVE_EVERY < done < len(losses)
    resumed, of_rest = fit(killed)
    assert of_rest == losses[done:]
    assert_equal(resumed, state)
    assert capsys.readouterr().out.startswith(f"going on after step {done}\n")
    assert steps_in(killed)[-1] == len(losses)


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
