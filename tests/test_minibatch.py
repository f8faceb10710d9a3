"""A batch as one value: what goes in, what is refused, and what steps make of it."""

import pickle
from functools import partial
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from checks import assert_close
from models import Tensor, hierarchy
from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

ROWS = 12
DATA = np.random.default_rng(0).normal(size=ROWS).astype("f4")


model = hierarchy(ROWS, "rows", 0.5)


class Pair(NamedTuple):
    x: object
    rest: dict


def svi_of(model=model):
    return SubsampleSVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())


@pytest.mark.parametrize(
    "kind",
    [np.array, jnp.array, list, Tensor, pd.Series, lambda v: pd.Series(v, index=v)],
)
def test_arrays_of_all_kinds_are_padded(kind):
    batch = minibatch(kind([3, 1, 2]), rows={"n": kind([5, 0, 5])}, capacity=5)
    np.testing.assert_array_equal(batch.args[0], [3, 1, 2, 2, 2])
    np.testing.assert_array_equal(batch.rows["n"], [5, 0, 5, 5, 5])
    assert batch.valid == batch.counts == {"n": 3}
    assert batch.counts["n"].dtype == np.int32
    is_jax = kind is jnp.array
    assert all(isinstance(a, jax.Array) is is_jax for a in jax.tree.leaves(batch)[:2])


def test_trees_and_numbers():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    given = Pair(table, {"weights": [True, False], "none": None, "level": 7})
    batch = minibatch(given, 2.5, 3, rows={"n": [4, 9]}, capacity=3)
    pair, *numbers = batch.args
    assert isinstance(pair, Pair)
    np.testing.assert_array_equal(pair.x, [[1, 3], [2, 4], [2, 4]])
    np.testing.assert_array_equal(pair.rest["weights"], [True, False, False])
    assert pair.rest["none"] is None
    # Not Python's numbers, for which some compiled functions would be compiled anew.
    numbers.append(pair.rest["level"])
    assert [(type(n), n.shape, n.item()) for n in numbers] == [
        (np.ndarray, (), 2.5),
        (np.ndarray, (), 3),
        (np.ndarray, (), 7),
    ]


def test_plates_of_different_lengths():
    def of(capacity):
        return minibatch(
            np.arange(2.0),
            y=np.arange(5.0),
            student=np.array([0, 0, 1, 1, 1]),
            rows={"students": [7, 3]},
            along={"ratings": ("y", "student")},
            capacity=capacity,
        )

    for capacity, lengths in [
        (None, (2, 5)),
        (8, (8, 8)),
        ({"ratings": 6}, (2, 6)),
        ({"ratings": 6, "students": 3}, (3, 6)),
        (lambda count: 1 << (count - 1).bit_length(), (2, 8)),
    ]:
        batch = of(capacity)
        assert len(batch.args[0]) == len(batch.rows["students"]) == lengths[0]
        assert {len(array) for array in batch.kwargs.values()} == {lengths[1]}
        assert batch.counts == {"students": 2, "ratings": 5}
        padded = capacity if isinstance(capacity, dict) else batch.counts
        assert batch.valid.keys() == (set() if capacity is None else padded.keys())
        assert batch.indices.keys() == {"students"}


def test_crossed_plates_and_plates_without_rows():
    batch = minibatch(
        np.zeros((2, 3)),
        np.arange(3),
        0.5,
        rows={"users": None, "items": [4, 6, 8]},
        along={"users": 0, "items": [1]},
        capacity={"users": 4},
    )
    assert [np.shape(a) for a in batch.args] == [(4, 3), (3,), ()]
    assert batch.counts == {"users": 2, "items": 3}
    assert batch.valid == {"users": 2}
    assert batch.indices.keys() == {"items"}


X3 = np.zeros(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: minibatch(X3, rows={"n": X3}), "plate 'n' must be a vector of int"),
        (lambda: minibatch(X3, rows={"n": [[0, 1, 2]]}), "plate 'n'.*shape .1, 3."),
        (lambda: minibatch(X3, rows={"n": X3 > 1}), "plate 'n'.*type bool"),
        (lambda: minibatch(X3, rows={"n": [0, -1, 2]}), "'n' run from -1 to 2, below"),
        (
            lambda: minibatch(X3, rows={"n": [0, 9, 2]}, size=9),
            r"'n' \(size 9\) run from 0 to 9, outside 0 to 8",
        ),
        (
            lambda: minibatch(X3, rows={"n": jnp.array([0, 9, 2])}, size={"n": 9}),
            r"'n' \(size 9\) run from 0 to 9, outside 0 to 8",
        ),
        (lambda: minibatch(X3, rows={"n": [0, 1]}), "'n' must have one length.*: 3"),
        (lambda: minibatch(X3, y=[1], rows={"n": None}), "'n' .*argument 'y'.: 1"),
        (lambda: minibatch(X3[:0], rows={"n": []}), "holds no row of plate 'n'"),
        (lambda: minibatch(2.0, rows={"n": None}), "'n' has neither rows nor"),
        (lambda: minibatch(X3, rows={"n": None}, capacity=2), "3 rows of plate 'n'"),
        (lambda: minibatch(X3, rows={"n": None}, capacity=8.0), "'n'.*not 8.0"),
        (lambda: minibatch(X3, rows={"n": None}, capacity=True), "'n'.*not True"),
        (lambda: minibatch(X3, rows={"n": None}, capacity={"m": 8}), "names .'m'"),
        (lambda: minibatch(X3, rows={"n": None}, size={"m": 8}), "size names .'m'"),
        (lambda: minibatch(X3, rows={"n": None, "m": None}), "which plate argument 0"),
        (
            lambda: minibatch(X3, rows={"n": None}, along={"m": "y"}),
            "along.'m'.* names 'y', but the arguments of the batch are .0.",
        ),
        (
            lambda: minibatch(X3, rows={}, along={"m": 0, "n": 0}),
            "argument 0 run along 'm' and 'n'",
        ),
        (lambda: minibatch("abc", rows={"n": None}), "argument 0 is of type str"),
        (
            lambda: minibatch(y={"a": ["b", "c"]}, rows={"n": None}),
            "argument 'y'.'a'. is of type list",
        ),
        (lambda: minibatch([[1], [2, 3]], rows={"n": None}), "cannot take argument 0"),
    ],
)
def test_mistakes_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("capacity", "padding"), [(None, []), (6, [11, 11])])
def test_a_step_is_that_of_indices_and_valid(capacity, padding):
    rows = np.array([2, 7, 7, 11])
    batch = minibatch(DATA[rows], 0.3, rows={"rows": rows}, capacity=capacity)
    rows = np.array([2, 7, 7, 11, *padding])
    apart = {"indices": {"rows": rows}, "valid": {"rows": 4} if capacity else None}
    svi, key = svi_of(), jax.random.key(0)
    state = svi.init(key, batch)
    run = partial(svi.run, key, 2, progress_bar=False, init_state=state)
    steps = [partial(svi.init, key), run]
    steps += [
        partial(step, state) for step in (svi.update, svi.stable_update, svi.evaluate)
    ]
    for step in steps:
        one, other = step(batch), step(DATA[rows], np.float32(0.3), **apart)
        assert_close(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((DATA,), {}),
        ((), {"noise": 0.1}),
        ((), {"indices": {"rows": np.arange(ROWS)}}),
        ((), {"valid": {"rows": 3}}),
    ],
)
def test_a_batch_is_all_that_a_step_takes(args, kwargs):
    batch = minibatch(DATA, rows={"rows": np.arange(ROWS)})
    with pytest.raises(ValueError, match="all that a step takes"):
        svi_of().init(jax.random.key(0), batch, *args, **kwargs)


def test_one_compilation_from_a_loader_and_scan():
    def make(rows):
        return minibatch(DATA[rows], rows={"rows": rows}, capacity=5, size=ROWS)

    loader = grain.MapDataset.range(ROWS).seed(0).shuffle().batch(5).map(make)
    loader = loader.to_iter_dataset(grain.ReadOptions(num_threads=1))
    # What worker processes make arrives pickled.
    batches = [pickle.loads(pickle.dumps(batch)) for batch in loader]
    assert [int(batch.counts["rows"]) for batch in batches] == [5, 5, 2]
    assert len({jax.tree.structure(batch) for batch in batches}) == 1

    traced = []

    def update(state, batch):
        assert isinstance(batch, Minibatch)
        traced.append(batch.args[0].shape)
        return svi.update(state, batch)

    svi = svi_of()
    state = first = svi.init(jax.random.key(0), batches[0])
    step, losses = jax.jit(update), []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(loss)
    assert traced == [(5,)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    scanned, of_scan = jax.lax.scan(update, first, stacked)
    np.testing.assert_allclose(of_scan, losses, rtol=1e-6)
    assert_close(scanned, state, rtol=1e-5)


def test_order_of_the_plates_survives_jax():
    batch = minibatch(rows={"b": [0], "a": [0, 1]})
    assert list(jax.tree.map(jnp.asarray, batch).rows) == ["b", "a"]
