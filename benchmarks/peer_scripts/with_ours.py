"""Fit InstEval with this library, one step after the other."""

import sys
import time

import jax
import numpy as np
import numpyro
import optax

from benchmarks.insteval import STEPS, load, subsample_svi
from benchmarks.peer_scripts.record import FIGURES, given, hand_back

data = given(sys.argv[1])
ratings = load()
epochs = [
    np.split(order, range(data.batch_size, len(order), data.batch_size))
    for order in data.orders
]
started = time.perf_counter()
schedule = optax.exponential_decay(data.rate, len(epochs) * STEPS, data.decay)
svi = subsample_svi(optax.adam(schedule))
capacity = ratings.capacity(part for parts in epochs for part in parts)
state = svi.init(jax.random.key(0), ratings(epochs[0][0], capacity=capacity))
step = jax.jit(svi.update, donate_argnums=0)
clock, figures, reading = [], [], 0.0
for parts in epochs:
    for part in parts:
        state, _ = step(state, ratings(part, capacity=capacity))
    jax.block_until_ready(state)
    now = time.perf_counter()
    clock.append(now - started - reading)
    median = svi.guide.median(svi.get_params(state))
    figures.append([float(median[name]) for name in FIGURES])
    reading += time.perf_counter() - now
hand_back(f"NumPyro {numpyro.__version__}", STEPS, clock, figures)
