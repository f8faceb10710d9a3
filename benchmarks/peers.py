"""Fit InstEval with this library and with others, in processes of their own."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .insteval import BATCH_SIZE, STUDENTS, deviation, load, parts_of
from .pairs import Row, run
from .peer_scripts.record import Given

WITHIN = 3  # percent of lme4's figures
STAY = 10  # epochs
EPOCHS = 150
SCRIPTS = Path(__file__).parent / "peer_scripts"


class Peer(NamedTuple):
    name: str
    module: str
    note: str
    epochs: int = EPOCHS


PEERS = (
    Peer("Pyro", "pyro", "the same ragged batches, eager"),
    Peer(
        "PyMC",
        "pymc",
        "pm.Minibatch: as many ratings in each batch, all students in every step",
        4 * EPOCHS,  # with as few as the others it is far off
    ),
)


def fits(python: str, script: str, quick: bool, epochs: int) -> list[dict]:
    """Fit twice, of which only the first has to compile."""
    everything = load()(np.arange(STUDENTS)).kwargs
    orders = [np.concatenate(parts_of(n)) for n in range(2 if quick else epochs)]
    data = Given(
        student=everything["student"],
        lecturer=everything["lecturer"],
        y=everything["y"],
        orders=np.array(orders),
        batch_size=BATCH_SIZE,
        rate=0.02,
        decay=0.01,
        seconds=5 if quick else 120,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "insteval.npz"
        np.savez(path, **data._asdict())
        module = f"benchmarks.peer_scripts.with_{script}"
        command = [python, "-m", module, str(path)]
        return [run(command, folder) for _ in range(2)]


def seconds_to_agree(found: dict[str, Any]) -> float | None:
    """Return when the figures came within reach of lme4's for ten epochs."""
    if found["steps"] is None:  # lme4 itself
        return found["clock"][-1]
    near = [deviation(figures) <= WITHIN for figures in found["figures"]]
    for number in range(len(near) - STAY + 1):
        if all(near[number : number + STAY]):
            return found["clock"][number]
    return None


def step(found: dict[str, Any]) -> float | None:
    """Return the median step, without the first epoch, in which all compiles."""
    if len(found["clock"]) < 2:
        return None
    return float(np.median(np.diff(found["clock"]))) / found["steps"]


def compare(
    name: str, ours: list[dict], theirs: list[dict], note: str
) -> Iterator[Row]:
    label = f"{name} ({theirs[0]['version']})"
    if theirs[0]["steps"]:
        yield Row("a step", label, "s", step(ours[0]), step(theirs[0]), None, note)
    for again, *found in zip(("", ", compiled before"), ours, theirs, strict=True):
        apart = [f"{deviation(own['figures'][-1]):.1f} %" for own in found]
        ends = f"in the end {' and '.join(apart)} off"
        case = f"within {WITHIN} % of lme4{again}"
        yield Row(case, label, "s", *map(seconds_to_agree, found), None, ends)


def works(command: list[str]) -> bool:
    found = shutil.which(command[0]) is not None
    return found and subprocess.run(command, capture_output=True).returncode == 0


def cases(quick: bool, python: str = sys.executable) -> Iterator[Row]:
    ours = fits(sys.executable, "ours", quick, EPOCHS)
    for name, module, note, epochs in PEERS:
        if works([python, "-c", f"import {module}"]):
            theirs = fits(python, module, quick, epochs)
            yield from compare(name, ours, theirs, note)
        else:
            yield Row("InstEval", name, note="skipped, as it is not installed")
    if works(["Rscript", "-e", "library(lme4)"]):
        found = run(["Rscript", str(SCRIPTS / "with_lme4.R")])
        assert deviation(found["figures"][-1]) < 0.1, "lme4 is far from its own figures"
        yield from compare("lme4", ours, [found, found], "")
    else:
        yield Row("InstEval", "lme4", note="skipped, as it is not installed")
