"""Fit InstEval with this library and with others, in processes of their own."""

import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numpyro_dynamic_subsample.__main__ import load, shuffles

from .insteval import BATCH_SIZE, deviation
from .pairs import Case, Found, Row
from .peer_scripts.record import Given

WITHIN = 3  # percent of lme4's figures
EPOCHS = 150
STAY = 10  # epochs
SCRIPTS = "benchmarks.peer_scripts"


class Peer(NamedTuple):
    name: str
    module: str  # that must be there
    script: list[str]
    install: str
    target: float
    note: str = ""


PEERS = (
    Peer(
        "Pyro",
        "pyro",
        [f"{SCRIPTS}.with_pyro"],
        "pip install torch pyro-ppl",
        0.1,
        "the same ragged batches, eager",
    ),
    Peer(
        "PyMC, pm.Minibatch",
        "pymc",
        [f"{SCRIPTS}.with_pymc", "minibatch"],
        "pip install pymc",
        0.1,
        "batches of one size, of ratings, and all students in every step: "
        "pm.Minibatch takes no plate's rows, nor sizes that change",
    ),
    Peer(
        "PyMC, full batch",
        "pymc",
        [f"{SCRIPTS}.with_pymc", "full"],
        "pip install pymc",
        0.1,
        "a step is on all ratings",
    ),
)


def data_file(folder: Path, quick: bool) -> Path:
    """Write what all fits are given."""
    ratings = load()
    student = np.empty(len(ratings.y), dtype="int32")
    for number, places in enumerate(ratings.of_student):
        student[places] = number
    epochs = 2 if quick else EPOCHS
    orders = np.array(list(shuffles(epochs, 0)))
    data = Given(
        student=student,
        lecturer=ratings.lecturer,
        y=ratings.y,
        orders=orders,
        batch_size=BATCH_SIZE,
        rate=0.02,
        decay=0.01,
        seconds=5 if quick else 120,
    )
    path = folder / "insteval.npz"
    np.savez(path, **data._asdict())
    return path


def run(command: list[str]) -> dict[str, Any]:
    """Run a fit to its end, and read the last line that it prints."""
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fit(python: str, script: list[str], quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = data_file(Path(folder), quick)
        return run([python, "-m", script[0], str(path), *script[1:]])


def seconds_to_agree(found: dict[str, Any]) -> float | None:
    """Return when the figures came within reach of lme4's for ten epochs."""
    near = [deviation(figures) <= WITHIN for figures in found["figures"]]
    for number in range(len(near) - STAY + 1):
        if all(near[number : number + STAY]):
            return found["clock"][number]
    return None


def step_ms(found: dict[str, Any]) -> float | None:
    """Return the median step, without the first epoch, in which all compiles."""
    if len(found["clock"]) < 2:
        return None
    return 1e3 * float(np.median(np.diff(found["clock"]))) / found["steps"]


@cache
def there(python: str, module: str) -> bool:
    check = (
        f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"
    )
    return subprocess.run([python, "-c", check]).returncode == 0


def against_peer(peer: Peer, python: str, quick: bool) -> Found:
    if not there(python, peer.module):
        note = f"skipped: {peer.install}, or name another interpreter"
        row = Row("InstEval", peer.name, "", None, None, None, note)
        return Found([row], {})
    found = fit(python, peer.script, quick)
    ours = fit(sys.executable, [f"{SCRIPTS}.with_ours"], quick)
    label = f"{peer.name} ({found['version']})"
    seconds = seconds_to_agree(found)
    note = f"ends {deviation(found['figures'][-1]):.1f} % off lme4, ours "
    note += f"{deviation(ours['figures'][-1]):.1f} %"
    if seconds is None:
        epochs, lasted = len(found["clock"]), found["clock"][-1]
        note = f"never, in {epochs} epochs and {lasted:.0f} s; {note}"
    memory = (each["peak_bytes"] / 2**20 for each in (ours, found))
    values = seconds_to_agree(ours), seconds
    rows = [
        Row("a step", label, "ms", step_ms(ours), step_ms(found), None, peer.note),
        Row(f"within {WITHIN} % of lme4", label, "s", *values, peer.target, note),
        Row("peak memory of the process", label, "MiB", *memory),
    ]
    return Found(rows, {})


def against_lme4() -> Found:
    command = "library(lme4)"
    program = shutil.which("Rscript")
    absent = program is None or (
        subprocess.run([program, "-e", command], capture_output=True).returncode
    )
    if absent or program is None:
        note = "skipped: apt-get install r-base-core r-cran-lme4"
        return Found([Row("InstEval", "lme4", "", None, None, None, note)], {})
    script = Path(__file__).parent / "peer_scripts" / "with_lme4.R"
    found = run([program, str(script)])
    ours = fit(sys.executable, [f"{SCRIPTS}.with_ours"], quick=False)
    apart = deviation(found["figures"][-1])
    assert apart < 0.1, f"lme4 is {apart:.2f} % off its own figures"
    memory = (each["peak_bytes"] / 2**20 for each in (ours, found))
    values = seconds_to_agree(ours), found["clock"][-1]
    rows = [
        Row(f"within {WITHIN} % of lme4", found["version"], "s", *values, 1.0),
        Row("peak memory of the process", found["version"], "MiB", *memory),
    ]
    return Found(rows, {})


def ours_alone() -> Found:
    """Keep our own script from rotting where no peer is installed."""
    ours = fit(sys.executable, [f"{SCRIPTS}.with_ours"], quick=True)
    return Found([Row("a step", "nobody", "ms", step_ms(ours), None)], {})


def cases(quick: bool, python: str = sys.executable) -> list[Case]:
    found = [Case(p.name, partial(against_peer, p, python, quick)) for p in PEERS]
    if quick:
        return [Case("ours alone", ours_alone), *found]
    return [*found, Case("lme4", against_lme4)]
