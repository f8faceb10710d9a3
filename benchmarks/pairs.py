"""What all families share: times in turns, answers that agree, rows of a table."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

HEADER = """\
| Case | Against | Ours | Other | Ratio | Aim | Met | Note |
| --- | --- | --: | --: | --: | --: | --- | --- |"""
SIDES = ("ours", "other")
UNITS = {
    "s": ((1, "s"), (1e-3, "ms")),
    "bytes": ((2**20, "MiB"), (2**10, "KiB")),
}


Series = dict[str, Any]  # what a picture shows


class Row(NamedTuple):
    """Ours beside another way, in one unit of which less is better.

    Where it was measured several times, all values are given.
    """

    case: str
    against: str
    unit: str = ""
    ours: Any = None
    other: Any = None
    aim: float | None = None  # ours over the other, at most
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Keep medians, and the least and the most."""
        kept = {k: v for k, v in self._asdict().items() if v is not None}
        for side in kept.keys() & SIDES:
            values = kept[side]
            kept[side] = float(np.median(values))
            if np.size(values) > 1:
                kept[f"{side}_range"] = [float(np.min(values)), float(np.max(values))]
        if all(side in kept for side in SIDES):
            kept["ratio"] = kept["ours"] / kept["other"]
            if self.aim is not None:
                kept["met"] = kept["ratio"] <= self.aim
        return kept


def line(record: dict[str, Any]) -> str:
    """Write a record as a row of Markdown."""
    values = [_shown(record.get(side), record["unit"]) for side in SIDES]
    values += [_shown(record.get(key)) for key in ("ratio", "aim")]
    met = {True: "yes", False: "NO", None: ""}[record.get("met")]
    cells = [record["case"], record["against"], *values, met, record["note"]]
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    if unit in UNITS:
        scales = UNITS[unit]
        size, unit = next((own for own in scales if value >= own[0]), scales[-1])
        value /= size
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


class Steps:
    """A step that is called with one batch after the other, and keeps its state."""

    def __init__(self, step: Callable, state: Any, batches: list[tuple]) -> None:
        self.step, self.state, self.batches = step, state, cycle(batches)

    def __call__(self) -> Any:
        self.state, loss = self.step(self.state, *next(self.batches))
        return self.state, loss


def seconds(run: Callable[[], Any]) -> float:
    """Time a call and all that it has set going."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def in_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 10
) -> dict[str, np.ndarray]:
    """Time each way once in every round; all times, in seconds.

    Whatever else the machine does then meets all ways alike.
    """
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(ways[name]))
    return {name: np.array(of_way[warm_up:]) for name, of_way in times.items()}


def agree(answers: Mapping[str, Any], tolerance: float = 1e-4) -> None:
    """Refuse losses that differ by more than rounding, in 32 bits and many steps."""
    first, *others = (np.asarray(of_way) for of_way in answers.values())
    apart = max(float(np.abs(other / first - 1).max()) for other in others)
    if not apart <= tolerance:  # so that NaN is refused, too
        raise AssertionError(f"{', '.join(answers)}: answers differ by {apart:.1e}.")


def run(command: list[str], caches: Path | None = None) -> dict[str, Any]:
    """Run a process to its end, and read the last line that it prints.

    What it compiles it keeps in a folder, if it is given one.
    """
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": str(caches is not None)}
    if caches is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": f"{caches}/jax",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTENSOR_FLAGS": f"base_compiledir={caches}/pytensor",
        }
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
