"""What all pairs share: timing in turns, answers that agree, and what is kept."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

SIDES = ("ours", "other")


class Row(NamedTuple):
    """Ours beside another way, in one unit of which less is better.

    Where it was measured several times, all values are given.
    """

    case: str
    against: str
    unit: str
    ours: float | np.ndarray | None
    other: float | np.ndarray | None
    target: float | None = None  # ours over the other, at most
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.ours is None or self.other is None:
            return None
        return float(np.median(self.ours) / np.median(self.other))

    @property
    def met(self) -> bool | None:
        if self.target is None or self.ratio is None:
            return None
        return self.ratio <= self.target

    def record(self) -> dict[str, Any]:
        """Keep medians, and the least and the most."""
        kept = {**self._asdict(), "ratio": self.ratio, "met": self.met}
        for side in SIDES:
            values = kept[side]
            if values is not None:
                kept[side] = float(np.median(values))
            if np.size(values) > 1:
                kept[f"{side}_range"] = [float(np.min(values)), float(np.max(values))]
        return kept


class Found(NamedTuple):
    """What a case has found; series are for pictures."""

    rows: list[Row]
    series: dict[str, Any]


class Case(NamedTuple):
    name: str
    run: Callable[[], Found]


class Steps:
    """A step that is called with one batch after the other, and keeps its state."""

    def __init__(self, step: Callable, state: Any, batches: list[tuple]) -> None:
        self.step = step
        self.state = state
        self.batches: Iterator[tuple] = cycle(batches)

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
            taken = seconds(ways[name])
            if number >= 0:
                times[name].append(taken)
    return {name: np.array(of_way) for name, of_way in times.items()}


def agree(losses: Mapping[str, Any], tolerance: float = 1e-4) -> float:
    """Refuse losses that differ by more than rounding, in 32 bits and many steps."""
    first, *others = (np.asarray(of_way) for of_way in losses.values())
    apart = max(float(np.abs(other / first - 1).max()) for other in others)
    if not apart <= tolerance:  # so that NaN is refused, too
        raise AssertionError(f"{', '.join(losses)}: losses differ by {apart:.1e}.")
    return apart


def run(command: list[str], caches: Path | None = None) -> dict[str, Any]:
    """Run a process to its end, and read the last line that it prints.

    What it compiles it keeps in a folder, if it is given one.
    """
    environment = {
        n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"
    }
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


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    lines = [
        "| Case | Against | Ours | Other | Ratio | Target | Met | Note |",
        "| --- | --- | --: | --: | --: | --: | --- | --- |",
    ]
    for row in rows:
        unit = row["unit"]
        cells = [row["case"], row["against"], *(_value(row[k], unit) for k in SIDES)]
        cells += [_value(row["ratio"]), _value(row["target"])]
        cells += [{True: "yes", False: "NO", None: ""}[row["met"]], row["note"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".strip()
