"""Prediction: against vmapped JAX by hand, and in batches against one call."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from numpyro_dynamic_subsample import minibatch

from .pairs import Row, agree, in_turns
from .rows import NOISE, conjugate_svi, observations

KEY = jax.random.key(0)


@partial(jax.jit, static_argnums=3)
def by_hand(key: jax.Array, params: Any, rows: jax.Array, draws: int) -> jax.Array:
    """Draw latents of some rows, and their data, all draws at once."""
    loc, scale = params["z_auto_loc"][rows], params["z_auto_scale"][rows]

    def one(key: jax.Array) -> jax.Array:
        of_latents, of_data = jax.random.split(key)
        z = loc + scale * jax.random.normal(of_latents, loc.shape)
        return z + NOISE * jax.random.normal(of_data, loc.shape)

    return jax.vmap(one)(jax.random.split(key, draws))


class Prediction:
    """Draws of the data of rows, batch after batch, which all come to the host."""

    def __init__(self, total: int, draws: int, first: np.ndarray) -> None:
        self.y, self.draws = observations(total), draws
        self.svi = conjugate_svi(total, optax.adam(0.01), False)
        self.params = self.svi.get_params(self.svi.init(KEY, self.batch(first)))

    def batch(self, rows: np.ndarray) -> Any:
        return minibatch(self.y[rows], rows={"rows": rows})

    def ours(self, batches: Any) -> np.ndarray:
        return self.svi.predict(
            KEY, self.params, batches, self.draws, ["y"], progress_bar=False
        )["y"]

    def other(self, rows: list[np.ndarray]) -> np.ndarray:
        keys = jax.random.split(KEY, len(rows))
        drawn = (
            by_hand(key, self.params, own, self.draws)
            for key, own in zip(keys, rows, strict=True)
        )
        return np.concatenate([np.asarray(own) for own in drawn], 1)


def against_by_hand(size: int, batches: int, quick: bool) -> Iterator[Row]:
    total, choose = 1_000_000, np.random.default_rng(0)
    order = choose.permutation(total).astype("int32")
    rows = np.split(order[: batches * size], batches)
    prediction = Prediction(total, 1000, rows[0])
    # One batch takes less time than to trace model and guide, which each call does.
    for count, aim in ((batches, None if quick else 1.5), (1, None)):
        given = list(map(prediction.batch, rows[:count]))
        ways = {
            "ours": partial(prediction.ours, given),
            "by hand": partial(prediction.other, rows[:count]),
        }
        agree({way: draw().std() for way, draw in ways.items()}, tolerance=0.03)
        took = in_turns(ways, 2 if quick else 10, warm_up=1)
        case = f"1,000 draws, {count:,} times {size:,} rows"
        yield Row(case, "vmap by hand", "s", *took.values(), aim)


def in_batches(total: int, size: int, rounds: int) -> Row:
    rows = np.split(np.arange(total), range(size, total, size))
    prediction = Prediction(total, 100, rows[0])
    ways = {
        "in batches": partial(prediction.ours, list(map(prediction.batch, rows))),
        "at once": partial(prediction.ours, prediction.batch(np.arange(total))),
    }
    agree({way: draw().std() for way, draw in ways.items()}, tolerance=0.01)
    case = f"100 draws, {len(rows):,} times {size:,} rows"
    return Row(case, "one batch", "s", *in_turns(ways, rounds, 1).values(), 1.2)


def cases(quick: bool) -> Iterator[Row]:
    for size, batches in ((16, 10),) if quick else ((16, 1000), (256, 100), (4096, 10)):
        yield from against_by_hand(size, batches, quick)
    yield in_batches(*(20_000, 10_000, 1) if quick else (400_000, 10_000, 5))
