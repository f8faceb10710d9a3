"""Many steps, and many compilations, leave nothing behind."""

import gc
import os
from itertools import cycle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.primitives import _PYRO_STACK

from checks import pad, told
from models import hierarchy, svi_of

ROWS = 100
DATA = np.linspace(-1, 1, ROWS, dtype="float32")


model = hierarchy(ROWS, "rows")


def objects():
    gc.collect()
    return len(gc.get_objects())


def memory():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def steps():
    """Yield padded batches of 1 to 8 rows, for ever."""
    draw = np.random.default_rng(0)
    some = []
    for size in draw.integers(1, 9, 1000):
        rows = draw.choice(ROWS, size, replace=False)
        (batch, rows), count = pad(
            (DATA[rows], rows), 1 << (len(rows) - 1).bit_length()
        )
        some.append((batch, {"rows": rows}, {"rows": count}))
    return cycle(some)


def test_many_steps():
    svi = svi_of(model, AutoDelta, "SubsampleSVI", optim=optax.sgd(0.01))
    state = svi.init(jax.random.key(0), told(DATA[:3], rows={"rows": np.arange(3)}))
    traced, kept = [], []

    def update(state, batch, indices, valid):
        traced.append(len(batch))
        return svi.update(state, told(batch, rows=indices, counts=valid))

    step = jax.jit(update, donate_argnums=0)
    for number, batch in zip(range(30_001), steps(), strict=False):
        state, loss = step(state, *batch)
        if number in (5_000, 30_000):
            assert np.isfinite(loss)
            kept.append((objects(), len(jax.live_arrays()), memory()))
    assert sorted(traced) == [1, 2, 4, 8]
    assert _PYRO_STACK == []
    (objects_before, arrays_before, before), (objects_after, arrays_after, after) = kept
    assert arrays_after == arrays_before
    assert objects_after < objects_before + 100
    # Keeping one small array of each step would take more.
    assert after - before < 25_000 * 100


def test_many_compilations():
    svi = svi_of(model, AutoNormal, "SubsampleSVI", optim=optax.sgd(0.01))
    state = svi.init(jax.random.key(0), told(DATA[:3], rows={"rows": np.arange(3)}))
    kept = []
    for number in range(41):
        rows = np.arange(1 + number % 20)

        def update(state, rows):
            return svi.update(state, told(jnp.asarray(DATA)[rows], rows={"rows": rows}))

        jax.eval_shape(update, state, rows)
        if number in (20, 40):
            kept.append((objects(), len(jax.live_arrays())))
    (objects_before, arrays_before), (objects_after, arrays_after) = kept
    assert arrays_after == arrays_before
    # JAX itself keeps a weak reference to each function that it has traced.
    assert objects_after < objects_before + 2 * 20
