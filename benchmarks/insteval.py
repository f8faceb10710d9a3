"""Fit lme4's InstEval in mini-batches of students, with its four figures per epoch."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer import TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import RaggedGroups, SubsampleSVI
from numpyro_dynamic_subsample.__main__ import (
    LME4,
    STUDENTS,
    cut,
    model,
    start,
)

BATCH_SIZE = 128
STEPS = -(-STUDENTS // BATCH_SIZE)  # in an epoch


class Epoch(NamedTuple):
    seconds: float  # since the fit began, without reading the figures
    figures: list[float]  # in the order of LME4


def subsample_svi(optimizer: Any, **options: Any) -> SubsampleSVI:
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start()))
    return SubsampleSVI(model, guide, optimizer, TraceMeanField_ELBO(), **options)


def deviation(figures: Iterable[float]) -> float:
    """Return by how many percent the worst of the figures differs from lme4's."""
    apart = np.asarray(figures) / list(LME4.values()) - 1
    return 100 * float(np.abs(apart).max())


def fit(
    ratings: RaggedGroups, orders: np.ndarray, optimizer: Any, **options: Any
) -> Iterator[Epoch]:
    """Take one step after the other, and yield what each epoch has come to."""
    svi = subsample_svi(optimizer, **options)
    started = time.perf_counter()
    epochs = [cut(order, BATCH_SIZE) for order in orders]
    capacity = ratings.capacity(part for parts in epochs for part in parts)
    first = ratings(epochs[0][0], capacity=capacity)
    state = svi.init(jax.random.key(0), first)
    step = jax.jit(svi.update, donate_argnums=0)
    reading = 0.0
    for parts in epochs:
        for part in parts:
            state, _ = step(state, ratings(part, capacity=capacity))
        jax.block_until_ready(state)
        now = time.perf_counter()
        params = jax.device_get(svi.get_params(state))
        figures = [float(params[f"{name}_auto_loc"]) for name in LME4]
        # The median of a latent that is positive; the intercept is not confined.
        figures[1:] = np.exp(figures[1:]).tolist()
        yield Epoch(now - started - reading, figures)
        reading += time.perf_counter() - now
