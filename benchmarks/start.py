"""Time to the first step, from ``SVI(...)`` on, in processes that begin with nothing.

``python -m benchmarks.start WAY`` is such a process.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax

from .pairs import Row, agree, run, seconds
from .steps import AGAINST, drawn, factorisation, other_side, our_side

AIMS = {"ordinary": 0.5, "row-wise": 0.6, "padded": None}
BATCH = 64  # a batch that is padded to its own size is that of the others


def first_step(way: str) -> dict[str, float]:
    """Initialise and take a step."""
    problem = factorisation()
    batch = drawn(problem, BATCH)
    options = {"row-wise": {"rowwise": True}, "padded": {"capacity": BATCH}}
    losses = []

    def start() -> Any:
        if way == AGAINST:
            side = other_side(problem)
        else:
            side = our_side(problem, **options.get(way, {}))
        step = jax.jit(side.step, donate_argnums=0)
        state, loss = step(side.init(*batch), *batch)
        losses.append(loss)
        return state, loss

    return {"seconds": seconds(start), "loss": float(losses[0])}


def cases(quick: bool) -> Iterator[Row]:
    """Start processes in turns."""
    aims = {"row-wise": AIMS["row-wise"]} if quick else AIMS
    took: dict[str, list[float]] = {way: [] for way in (AGAINST, *aims)}
    losses: dict[str, float] = {}
    for _ in range(1 if quick else 5):
        for way, own in took.items():
            found = run([sys.executable, "-m", "benchmarks.start", way])
            own.append(found["seconds"])
            losses[way] = found["loss"]
    agree(losses)
    for way, aim in aims.items():
        yield Row(f"first step, {way}", AGAINST, "s", took[way], took[AGAINST], aim)


if __name__ == "__main__":
    print(json.dumps(first_step(sys.argv[1])))
