"""A fit that is killed goes on from its checkpoints, to the very same end."""

import signal
import subprocess
import sys

import numpy as np

from checks import assert_equal, assert_prints
from numpyro_dynamic_subsample.examples import resumable
from numpyro_dynamic_subsample.examples.resumable import SAVE_EVERY, fit


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
