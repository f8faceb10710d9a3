"""Fit InstEval with this library and with others, in processes of their own."""

import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numpyro_dynamic_subsample.__main__ import STUDENTS, load, shuffled

from .insteval import BATCH_SIZE, deviation
from .pairs import Case, Found, Row, run
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
    note: str
    epochs: int = EPOCHS
    compiles: bool = True


PEERS = (
    Peer(
        "Pyro",
        "pyro",
        [f"{SCRIPTS}.with_pyro"],
        "pip install torch pyro-ppl",
        "the same ragged batches, eager",
        compiles=False,
    ),
    Peer(
        "PyMC, pm.Minibatch",
        "pymc",
        [f"{SCRIPTS}.with_pymc", "minibatch"],
        "pip install pymc",
        "batches of one size, of ratings, and all students in every step: "
        "pm.Minibatch takes no plate's rows, nor sizes that change",
        epochs=4 * EPOCHS,  # with as few as the others it is far off
    ),
    Peer(
        "PyMC, full batch",
        "pymc",
        [f"{SCRIPTS}.with_pymc", "full"],
        "pip install pymc",
        "a step is on all ratings",
    ),
)


def data_file(folder: Path, epochs: int, seconds: float) -> Path:
    """Write what a fit is given."""
    ratings = load()
    everything = ratings(np.arange(STUDENTS)).kwargs
    data = Given(
        student=everything["student"],
        lecturer=everything["lecturer"],
        y=everything["y"],
        orders=np.array([shuffled(epoch, 0) for epoch in range(epochs)]),
        batch_size=BATCH_SIZE,
        rate=0.02,
        decay=0.01,
        seconds=seconds,
    )
    path = folder / "insteval.npz"
    np.savez(path, **data._asdict())
    return path


def fits(
    python: str, script: list[str], quick: bool, epochs: int, times: int
) -> list[dict[str, Any]]:
    """Fit some times, of which only the first has to compile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = data_file(folder, 2 if quick else epochs, 5 if quick else 120)
        command = [python, "-m", script[0], str(path), *script[1:]]
        return [run(command, folder) for _ in range(times)]


def our_fits(quick: bool, times: int) -> list[dict[str, Any]]:
    return fits(sys.executable, [f"{SCRIPTS}.with_ours"], quick, EPOCHS, times)


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


def agreement(label: str, ours: Any, theirs: Any) -> list[Row]:
    """Compare times to lme4's figures, in a first fit and in one compiled before."""
    rows = []
    for case, mine, other in zip(("first", "again"), ours, theirs, strict=True):
        seconds = seconds_to_agree(other) if other["steps"] else other["clock"][-1]
        apart = [deviation(found["figures"][-1]) for found in (mine, other)]
        note = f"in the end {apart[0]:.1f} % and {apart[1]:.1f} % off"
        if seconds is None:
            epochs, lasted = len(other["clock"]), other["clock"][-1]
            note = f"{note}; the other never, in {epochs} epochs and {lasted:.0f} s"
        values = seconds_to_agree(mine), seconds
        again = "" if case == "first" else ", compiled before"
        rows.append(
            Row(f"within {WITHIN} % of lme4{again}", label, "s", *values, None, note)
        )
    memory = (found[0]["peak_bytes"] / 2**20 for found in (ours, theirs))
    return [*rows, Row("peak memory of the process", label, "MiB", *memory)]


def skipped(name: str, install: str) -> Found:
    note = f"skipped, as it is not installed: {install}"
    return Found([Row("InstEval", name, "", None, None, None, note)], {})


def against_peer(peer: Peer, python: str, quick: bool) -> Found:
    if not there(python, peer.module):
        return skipped(peer.name, f"{peer.install}, here or for --peers-python")
    times = 2 if peer.compiles and not quick else 1
    theirs = fits(python, peer.script, quick, peer.epochs, times)
    theirs += theirs[:1] if times == 1 else []
    ours = our_fits(quick, 2)
    label = f"{peer.name} ({theirs[0]['version']})"
    values = step_ms(ours[0]), step_ms(theirs[0])
    step = Row("a step", label, "ms", *values, None, peer.note)
    return Found([step, *agreement(label, ours, theirs)], {})


def against_lme4() -> Found:
    program = shutil.which("Rscript")
    check = [program or "", "-e", "library(lme4)"]
    if program is None or subprocess.run(check, capture_output=True).returncode:
        return skipped("lme4", "apt-get install r-base-core r-cran-lme4")
    script = Path(__file__).parent / "peer_scripts" / "with_lme4.R"
    found = run([program, str(script)], script.parent)
    apart = deviation(found["figures"][-1])
    assert apart < 0.1, f"lme4 is {apart:.2f} % off its own figures"
    rows = agreement(found["version"], our_fits(False, 2), [found, found])
    return Found(rows, {})


def ours_alone() -> Found:
    """Keep our own script from rotting where no peer is installed."""
    (ours,) = our_fits(True, 1)
    return Found([Row("a step", "nobody", "ms", step_ms(ours), None)], {})


def cases(quick: bool, python: str = sys.executable) -> list[Case]:
    found = [Case(p.name, partial(against_peer, p, python, quick)) for p in PEERS]
    if quick:
        return [Case("ours alone", ours_alone), *found]
    return [*found, Case("lme4", against_lme4)]
