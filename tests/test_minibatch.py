"""A batch as one value: what goes in, what is refused, and what steps make of it."""

import itertools
import pickle
import warnings
from functools import partial
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.scipy.stats import norm
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoDelta

from checks import assert_close, told
from models import Tensor, hierarchy, svi_of
from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

ROWS = 12
DATA = np.random.default_rng(0).normal(size=ROWS).astype("f4")


model = hierarchy(ROWS, "rows", 0.5)


class Pair(NamedTuple):
    x: object
    rest: dict


fresh = partial(svi_of, model, form="SubsampleSVI", optim=optax.adam(0.1))


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
        ("powers of two", (2, 8)),
        ({"students": 3, "ratings": "powers of two"}, (3, 8)),
    ]:
        batch = of(capacity)
        assert len(batch.args[0]) == len(batch.rows["students"]) == lengths[0]
        assert {len(array) for array in batch.kwargs.values()} == {lengths[1]}
        assert batch.counts == {"students": 2, "ratings": 5}
        padded = capacity if isinstance(capacity, dict) else batch.counts
        assert batch.valid.keys() == (set() if capacity is None else padded.keys())
        assert batch.pinned.keys() == {"students"}


@given(
    count=st.integers(1, 40),
    size=st.none() | st.integers(40, 60),
    capacity=st.integers(1, 50) | st.just("powers of two"),
)
def test_a_capacity_is_a_step_that_ends_below_the_size(count, size, capacity):
    with warnings.catch_warnings(record=True, action="always") as told:
        batch = minibatch(
            np.arange(count), rows={"n": np.arange(count)}, capacity=capacity, size=size
        )
    exceeds = capacity != "powers of two" and count > capacity
    text = f"more rows of plate 'n' than its capacity of {capacity}, "
    assert [text in str(warning.message) for warning in told] == [True] * exceeds
    powers = (2**power for power in itertools.count())
    steps = powers if capacity == "powers of two" else range(0, 100, capacity)
    room = next(step for step in steps if step >= count)
    if size is not None:
        room = min(room, max(count, size - 1))
    expected = np.minimum(np.arange(room), count - 1)
    np.testing.assert_array_equal(batch.args[0], expected)
    np.testing.assert_array_equal(batch.rows["n"], expected)
    assert batch.valid == {"n": count}


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_any_axis_is_padded(kind):
    values = np.arange(24.0).reshape(2, 3, 4)
    keys = jax.random.split(jax.random.key(0), (2, 3))
    batch = minibatch(
        (kind(values), keys),
        rows={"a": None, "b": None},
        along={"a": 0, "b": {0: 1}},
        capacity={"a": 3, "b": 5},
    )
    array, padded_keys = batch.args[0]
    rows, columns = [0, 1, 1], [0, 1, 2, 2, 2]
    np.testing.assert_array_equal(array, values[rows][:, columns])
    assert (padded_keys == keys[np.ix_(rows, columns)]).all()
    series = minibatch(
        kind(values), rows={"n": [5, 2, 9, 7]}, along={"n": {0: -1}}, capacity=6
    )
    np.testing.assert_array_equal(series.args[0], values[..., [0, 1, 2, 3, 3, 3]])
    assert series.counts == {"n": 4}


def test_flags_and_texts_are_the_same_in_compiled_steps():
    seen = []

    @jax.jit
    def step(batch):
        seen.append((batch.args[1:], batch.kwargs["options"]))
        return batch.args[0].sum()

    def of(*flags, name="a", count=2):
        options = {"name": name, "level": count}
        return minibatch(
            X3[:count], *flags, options=options, rows={"n": None}, capacity=4
        )

    for batch in (of(True, None), of(True, None, count=3), of(False, None)):
        step(jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(batch))))
    assert [args for args, _ in seen] == [(True, None), (False, None)]
    assert [type(args[0]) for args, _ in seen] == [bool, bool]
    assert {options["name"] for _, options in seen} == {"a"}
    assert jax.tree.structure(of(name="b")) != jax.tree.structure(of(name="a"))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), of(True), of(True))
    assert jax.lax.scan(
        lambda c, b: (c, len(b.args[0]) if b.args[1] else 0), 0, stacked
    )[1].tolist() == [4, 4]


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
    assert batch.pinned.keys() == {"items"}


X3 = np.zeros(3)
of = partial(partial, minibatch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            of(X3, rows={"n": X3}),
            r"plate 'n' must be a vector of int.*Give rows.astype\(int\)",
        ),
        (of(X3, rows=np.arange(3)), "dict with plates for keys.*ndarray"),
        (
            of(np.ma.array(X3, mask=X3 > 1), rows={"n": None}),
            "argument 0 is a masked array",
        ),
        (
            of(X3, rows={"n": np.ma.array([1, 2, 3], mask=X3 > 1)}),
            "rows of plate 'n' is a masked array",
        ),
        (
            of(X3, rows={"n": np.array([1, 2, 2**32 + 5])}),
            "rows of plate 'n' holds 4294967301, but JAX would cut it to int32",
        ),
        (
            of(X3, rows={"n": np.array([1, 2, 2**31], "u4")}),
            "rows of plate 'n' holds 2147483648",
        ),
        (
            of(y=(X3, np.array([2**40] * 3)), rows={"n": None}),
            r"argument 'y'\[1\] holds 1099511627776",
        ),
        (of(X3, rows={"n": [[0, 1, 2]]}), "plate 'n'.*shape .1, 3."),
        (of(X3, rows={"n": X3 > 1}), "type bool.*flatnonzero"),
        (of(X3, rows={"n": [0, -1, 2]}), "'n' run from -1 to 2, below"),
        (
            of(X3, rows={"n": [0, 9, 2]}, size=9),
            r"'n' \(size 9\) run from 0 to 9, outside 0 to 8.*grow of.*unseen=",
        ),
        (
            of(X3, rows={"n": jnp.array([0, 9, 2])}, size={"n": 9}),
            r"'n' \(size 9\) run from 0 to 9, outside 0 to 8",
        ),
        (of(X3, rows={"n": [0, 1]}), "'n' must have one length.*: 3"),
        (of(X3, y=[1], rows={"n": None}), "'n' .*argument 'y'.: 1"),
        (of(X3[:0], rows={"n": []}), "holds no row of plate 'n'"),
        (of(2.0, rows={"n": None}), "'n' has neither rows nor"),
        (of(X3, rows={"n": None}, capacity=0), "'n'.*not 0"),
        (of(X3, rows={"n": None}, capacity="some"), "'n'.*not 'some'"),
        (of(X3, rows={"n": None}, size=2), "'n' .size 2.*3 rows"),
        (of(X3, rows={"n": None}, capacity=8.0), "'n'.*not 8.0"),
        (of(X3, rows={"n": None}, capacity=True), "'n'.*not True"),
        (of(X3, rows={"n": None}, capacity={"m": 8}), "names .'m'"),
        (of(X3, rows={"n": None}, size={"m": 8}), "size names .'m'"),
        (of(X3, rows={"n": None, "m": None}), "which plate argument 0"),
        (
            of(X3, rows={"n": None}, along={"m": "y"}),
            "along.'m'.* names 'y', but the arguments of the batch are .0.",
        ),
        (
            of(X3, rows={}, along={"m": 0, "n": 0}),
            "axis 0 of argument 0 run along 'm' and 'n'",
        ),
        (
            of(X3, rows={}, along={"m": {0: 1}}),
            "argument 0 has shape .3,., and so no axis 1 to run along plate 'm'",
        ),
        (
            of(X3, rows={}, along={"m": {0: "x"}}),
            "along.'m'. gives argument 0 the axis 'x'",
        ),
        (of(["abc"], rows={"n": None}), "argument 0 is of type list"),
        (
            of(y={"a": ["b", "c"]}, rows={"n": None}),
            "argument 'y'.'a'. is of type list",
        ),
        (of([[1], [2, 3]], rows={"n": None}), "cannot take argument 0"),
    ],
)
def test_mistakes_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_is_that_of_its_rows_and_counts():
    rows = np.array([2, 7, 7, 11])
    batch = minibatch(DATA[rows], 0.3, rows={"rows": rows}, capacity=6)
    rows = np.array([2, 7, 7, 11, 11, 11])
    counts = {"rows": 4}
    same = told(DATA[rows], np.float32(0.3), rows={"rows": rows}, counts=counts)
    svi, key = fresh(), jax.random.key(0)
    state = svi.init(key, batch)
    run = partial(svi.run, key, 2, progress_bar=False, init_state=state)
    steps = [partial(svi.init, key), run]
    steps += [partial(step, state) for step in (svi.update, svi.evaluate)]
    for step in steps:
        one, other = step(batch), step(same)
        assert_close(one, other, rtol=1e-6)


@pytest.mark.parametrize(("args", "kwargs"), [((DATA,), {}), ((), {"noise": 0.1})])
def test_a_batch_is_all_that_a_step_takes(args, kwargs):
    batch = minibatch(DATA, rows={"rows": np.arange(ROWS)})
    with pytest.raises(ValueError, match="all that a step takes"):
        fresh().init(jax.random.key(0), batch, *args, **kwargs)


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

    svi = fresh()
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


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u4", "i4", "i8"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_rows_and_counts_have_the_integer_type_of_jax(kind, dtype, x64):
    with jax.enable_x64(x64):
        rows = kind(np.array([5, 3, 100], dtype))
        batch = minibatch(rows={"n": rows}, capacity=4, size=500)
        whole = jnp.arange(1).dtype
        assert batch.rows["n"].dtype == batch.counts["n"].dtype == whole
        np.testing.assert_array_equal(batch.rows["n"], [5, 3, 100, 100])


def test_flag_of_the_model():
    def model(x, train):
        with numpyro.plate("n", ROWS, subsample_size=len(x)):
            numpyro.sample("x", dist.Normal(0, 1 if train else 2), obs=x)

    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    evaluate = jax.jit(svi.evaluate)
    for train in (True, False):
        batch = minibatch(DATA[:5], train=train, rows={"n": None}, capacity=8)
        state = svi.init(jax.random.key(0), batch)
        expected = -ROWS / 5 * norm.logpdf(DATA[:5], 0, 1 if train else 2).sum()
        np.testing.assert_allclose(evaluate(state, batch), expected, rtol=1e-5)
        draws = svi.predict(jax.random.key(0), state, batch, num_samples=2)["x"]
        assert draws.shape == (2, 5)


def test_inside_of_a_compiled_function():
    svi, rows = fresh(), np.array([5, 0, 5])
    state = svi.init(jax.random.key(0), minibatch(DATA, rows={"rows": np.arange(ROWS)}))

    def step(data, rows):
        batch = minibatch(data, rows={"rows": rows}, capacity=4, size=ROWS)
        return svi.update(state, batch)

    assert_close(jax.jit(step)(DATA[rows], rows), step(DATA[rows], rows), rtol=1e-5)
    with pytest.raises(ValueError, match="vector of integers.*shape .3, 1."):
        jax.jit(step)(DATA[rows], rows[:, None])
    with pytest.raises(ValueError, match="one length.*'rows': 2, 'argument 0': 3"):
        jax.jit(step)(DATA[rows], rows[:2])


def crossed(ratings, users, items):
    u_plate = numpyro.plate("users", 9, subsample_size=len(users), dim=-2)
    v_plate = numpyro.plate("items", 7, subsample_size=len(items), dim=-1)
    with u_plate:
        u = numpyro.sample("u", dist.Normal(0, 1))
    with v_plate:
        v = numpyro.sample("v", dist.Normal(0, 1))
    with u_plate, v_plate:
        numpyro.sample("ratings", dist.Normal(u * v, 0.5), obs=ratings)


def block(users, items):
    return minibatch(
        np.cos(3.0 * users[:, None] + items).astype("f4"),
        users,
        items=items,
        rows={"users": users, "items": items},
        along={"users": [0, 1], "items": {0: 1, "items": 0}},
        capacity={"users": 4, "items": "powers of two"},
        size={"users": 9, "items": 7},
    )


def loss_of_block(params, users, items):
    u, v = params["u_auto_loc"][users], params["v_auto_loc"][items]
    ratings = np.cos(3.0 * users[:, None] + items)
    log_prob = 9 / len(users) * norm.logpdf(u).sum()
    log_prob += 7 / len(items) * norm.logpdf(v).sum()
    scale = 9 * 7 / len(users) / len(items)
    return -log_prob - scale * norm.logpdf(ratings, u * v, 0.5).sum()


def in_time(y):
    plate = numpyro.plate("series", 9, subsample_size=y.shape[1])
    with plate:
        level = numpyro.sample("level", dist.Normal(0, 1))

    def step(before, y):
        with plate:
            numpyro.sample("y", dist.Normal(level + before, 0.5), obs=y)
        return y, None

    scan(step, jnp.zeros_like(y[0]), y)


def series(rows):
    y = np.sin(rows + 2.0 * np.arange(3)[:, None]).astype("f4")
    along = {"series": {0: -1}}
    return minibatch(y, rows={"series": rows}, along=along, capacity=4, size=9)


def loss_of_series(params, rows):
    level = params["level_auto_loc"][rows]
    y = np.sin(rows + 2.0 * np.arange(4)[:, None] - 2.0)
    y[0] = 0
    log_prob = norm.logpdf(level).sum() + norm.logpdf(y[1:], level + y[:-1], 0.5).sum()
    return -9 / len(rows) * log_prob


@pytest.mark.parametrize(
    ("model", "make", "loss_of", "sizes"),
    [
        (crossed, block, loss_of_block, [(4, 4), (1, 3)]),
        (in_time, series, loss_of_series, [(4,), (1,)]),
    ],
)
def test_plates_on_other_axes_share_one_compilation(model, make, loss_of, sizes):
    """Loss and gradients are those of the rows alone, written by hand."""
    draw, traced = np.random.default_rng(0), []
    guide = AutoDelta(model, init_loc_fn=init_to_sample)
    svi = SubsampleSVI(model, guide, optax.sgd(0.01), Trace_ELBO())

    @jax.jit
    def step(state, batch):
        traced.append(batch)
        return svi.update(state, batch)

    def rows_of(size):
        plates = zip((9, 7), size, strict=False)
        return [draw.choice(full, count, replace=False) for full, count in plates]

    rows = [rows_of(size) for size in sizes]
    state = svi.init(jax.random.key(0), make(*rows[0]))
    for own in rows:
        before = svi.get_params(state)
        state, loss = step(state, make(*own))
        np.testing.assert_allclose(loss, loss_of(before, *own), rtol=1e-5)
        after = svi.get_params(state)
        gradient = jax.grad(loss_of)(before, *own)
        for name, value in before.items():
            expected = value - 0.01 * gradient[name]
            np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5)
    assert len(traced) == 1


def test_order_of_the_plates_survives_jax():
    batch = minibatch(rows={"b": [0], "a": [0, 1]})
    assert list(jax.tree.map(jnp.asarray, batch).rows) == ["b", "a"]


def test_minibatch_for_a_plain_svi():
    batch = minibatch(DATA[:3], rows={"rows": np.arange(3)})
    for form in ("context", "wrapper"):
        with pytest.raises(TypeError, match="Minibatch is not an array. SubsampleSVI"):
            svi_of(model, form=form).init(jax.random.key(0), batch)
