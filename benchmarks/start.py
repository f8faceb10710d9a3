"""Time to the first step, from ``SVI(...)`` on, in processes that begin with nothing.

``python -m benchmarks.start WAY`` is such a process.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.handlers import substitute
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, minibatch

from .pairs import Case, Found, Row, agree, run, seconds

AGAINST = "create_plates"
USERS, ITEMS, FACTORS = 600, 300, 4
BATCH = 64
WAYS = {"ordinary": 0.5, "row-wise": 0.6, "padded": None}  # and targets


def plates(y: Any) -> list[Any]:
    users, items = y.shape
    return [
        numpyro.plate("users", USERS, subsample_size=users, dim=-2),
        numpyro.plate("items", ITEMS, subsample_size=items, dim=-1),
    ]


def model(y: Any) -> None:
    """Factorise a matrix, of which a batch holds some rows and columns."""
    users, items = plates(y)
    noise: Any = numpyro.sample("noise", dist.LogNormal(0, 1))
    factors = dist.Normal(jnp.zeros(FACTORS), 1).to_event(1)
    with users:
        u: Any = numpyro.sample("u", factors)
    with items:
        v: Any = numpyro.sample("v", factors)
    with users, items:
        numpyro.sample("y", dist.Normal((u * v).sum(-1), noise), obs=y)


def first_step(way: str) -> dict[str, float]:
    """Initialise and take a step."""
    draw = np.random.default_rng(0)
    # A batch that is padded to its own size is that of the others.
    y = draw.normal(size=(BATCH, BATCH)).astype("float32")
    rows = {
        name: draw.choice(size, BATCH, replace=False).astype("int32")
        for name, size in (("users", USERS), ("items", ITEMS))
    }
    key = jax.random.key(0)
    losses = []

    def by_hand() -> Any:
        guide = AutoNormal(model, create_plates=plates)
        svi = SVI(model, guide, optax.adam(0.01), Trace_ELBO())

        def update(state: Any, y: Any, rows: Any) -> Any:
            with substitute(data=rows):
                return svi.update(state, y)

        with substitute(data=jax.tree.map(jnp.asarray, rows)):
            state = svi.init(key, y)
        return state, update, (y, rows)

    def ours() -> Any:
        svi = SubsampleSVI(
            model,
            AutoNormal(model),
            optax.adam(0.01),
            Trace_ELBO(),
            rowwise=way == "row-wise",
        )
        capacity = BATCH if way == "padded" else None
        along = {"users": 0, "items": {0: 1}}
        batch = minibatch(y, rows=rows, along=along, capacity=capacity)
        return svi.init(key, batch), svi.update, (batch,)

    def start() -> Any:
        state, update, batch = by_hand() if way == AGAINST else ours()
        state, loss = jax.jit(update, donate_argnums=0)(state, *batch)
        losses.append(loss)
        return state, loss

    return {"seconds": seconds(start), "loss": float(losses[0])}


def compare(ways: tuple[str, ...], rounds: int, again: int) -> Found:
    """Start processes in turns; then some that find all compiled."""
    took: dict[str, list[float]] = {}
    losses: dict[str, float] = {}

    def measure(way: str, label: str, caches: Path | None = None) -> None:
        found = run([sys.executable, "-m", "benchmarks.start", way], caches)
        took.setdefault(label, []).append(found["seconds"])
        losses[way] = found["loss"]

    for _ in range(rounds):
        for way in (AGAINST, *ways):
            measure(way, way)
    with tempfile.TemporaryDirectory() as name:
        for number in range(again + 1 if again else 0):
            label = "again" if number else "into the cache"
            measure(ways[0], label, Path(name))
    agree(losses)
    pairs = [(way, way, AGAINST) for way in ways]
    if again:
        label = f"{ways[0]}, with JAX's persistent cache"
        pairs.append((label, "again", ways[0]))
    rows = [
        Row(
            f"first step, {label}",
            other,
            "s",
            *map(np.array, (took[way], took[other])),
            WAYS.get(label),
        )
        for label, way, other in pairs
    ]
    return Found(rows, {})


def cases(quick: bool) -> list[Case]:
    ways = tuple(WAYS)
    some = (ways[1:2], 1, 0) if quick else (ways, 5, 5)
    return [Case("matrix factorisation", partial(compare, *some))]


if __name__ == "__main__":
    print(json.dumps(first_step(sys.argv[1])))
