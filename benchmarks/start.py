"""Time to the first step, from ``SVI(...)`` on, in processes that begin with nothing.

``python -m benchmarks.start WAY`` is such a process.
"""

import json
import sys
from collections.abc import Iterator
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

from .pairs import Row, agree, run, seconds

AGAINST = "create_plates"
SIZES, FACTORS, BATCH = {"users": 600, "items": 300}, 4, 64
AIMS = {"ordinary": 0.5, "row-wise": 0.6, "padded": None}


def plates(y: Any) -> list[Any]:
    return [
        numpyro.plate(name, SIZES[name], subsample_size=count, dim=dim)
        for name, count, dim in zip(SIZES, y.shape, (-2, -1), strict=True)
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
    draw, key = np.random.default_rng(0), jax.random.key(0)
    y = draw.normal(size=(BATCH, BATCH)).astype("float32")
    rows = {
        name: draw.choice(size, BATCH, replace=False).astype("int32")
        for name, size in SIZES.items()
    }
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
        guide, optimizer, wise = AutoNormal(model), optax.adam(0.01), way == "row-wise"
        svi = SubsampleSVI(model, guide, optimizer, Trace_ELBO(), rowwise=wise)
        # A batch that is padded to its own size is that of the others.
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
