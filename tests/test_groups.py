"""Batches of groups with ragged members, against members picked one by one."""

import pickle
from functools import partial

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
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from models import Tensor
from numpyro_dynamic_subsample import RaggedGroups, SubsampleSVI

PLATES = ("students", "ratings")
STUDENT = np.array([2, 0, 3, 2, 2, 0, 4, 3, 2])  # of nine ratings; student 1 has none
Y = np.arange(9, dtype="f4") ** 2
AGE = np.array([20.0, 21.0, 22.0, 23.0, 24.0], "f4")


def of_students(**options):
    return RaggedGroups(
        STUDENT, plates=PLATES, members={"y": Y}, groups={"age": AGE}, **options
    )


@pytest.mark.filterwarnings("ignore:A batch has more rows:UserWarning")
@given(
    students=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    data=st.data(),
    capacity=st.sampled_from([None, 4, "powers of two", {"ratings": 50}]),
)
def test_a_batch_holds_all_members_of_its_groups(students, data, capacity):
    size = max(students) + data.draw(st.integers(1, 3))
    ages = np.arange(size) + 20.0
    ratings = RaggedGroups(
        students,
        plates=PLATES,
        members={"y": np.arange(len(students)), "x": np.eye(len(students))},
        groups={"age": ages},
        rows="idx",
    )
    row = st.integers(0, size - 1)
    rows = data.draw(st.lists(row, min_size=1, max_size=size), "rows")
    found = [
        (position, number)
        for position, own in enumerate(rows)
        for number, student in enumerate(students)
        if student == own
    ]
    assert ratings.size == size
    assert ratings.counts.tolist() == [students.count(row) for row in range(size)]
    if not found:
        with pytest.raises(ValueError, match="no row of plate 'ratings'. Skip"):
            ratings(rows)
        return
    batch = ratings(rows, capacity=capacity, level=2.5, train=True)
    assert batch.counts == {"students": len(rows), "ratings": len(found)}
    assert batch.args == () and batch.rows.keys() == {"students"}
    made = batch.kwargs
    assert made["count"] == len(rows)
    assert made["level"] == 2.5 and made["train"] is True
    np.testing.assert_array_equal(made["idx"], batch.rows["students"])
    np.testing.assert_array_equal(made["idx"][: len(rows)], rows)
    np.testing.assert_array_equal(made["age"], ages[made["idx"]])
    of_members = zip(made["group"].tolist(), made["y"].tolist(), strict=True)
    assert list(of_members)[: len(found)] == found
    np.testing.assert_array_equal(made["x"].argmax(1), made["y"])
    assert made["group"].max() < len(rows) <= len(made["idx"]) <= size
    if capacity is None:
        assert batch.padded == () and len(made["y"]) == len(found)


@pytest.mark.parametrize(
    "kind", [np.array, jnp.array, list, Tensor, lambda v: pd.Series(v, index=v[::-1])]
)
def test_columns_of_all_kinds(kind):
    members = {"y": kind(Y.tolist())}
    ratings = RaggedGroups(
        kind(STUDENT.tolist()), plates=PLATES, members=members, size=6
    )
    batch = pickle.loads(pickle.dumps(ratings))(kind([3, 0]))
    assert batch.kwargs["y"].tolist() == [4, 49, 1, 25]
    assert batch.kwargs["group"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("group", "labels", "rows", "known"),
    [
        (list("cacb"), None, [2, 0, 2, 1], list("abc")),
        (pd.Categorical(list("cacb"), list("cba")), None, [2, 0, 2, 1], list("abc")),
        (pd.Series(list("cacb"), dtype=object), list("cbda"), [0, 3, 0, 1], None),
        ([70, 10, 70, 30], [10, 30, 70], [2, 0, 2, 1], None),
        ([70, 10, 70, 30], [30, 70, 10], [1, 2, 1, 0], None),
        (pd.Series([2, 0, 2, 1], dtype="Int64"), None, [2, 0, 2, 1], None),
        (np.array([2, 0, 2, 1], "i1"), None, [2, 0, 2, 1], None),
    ],
)
def test_groups_are_rows_or_labels(group, labels, rows, known):
    members = {"y": np.arange(4.0)}
    ratings = RaggedGroups(group, plates=PLATES, members=members, labels=labels)
    for number, row in enumerate(rows):
        assert number in ratings([row]).kwargs["y"]
    known = labels if known is None else known
    assert known is None or list(ratings.labels) == known


def test_memory_map_is_not_read_as_a_whole(tmp_path):
    np.save(tmp_path / "y.npy", Y)
    y = np.load(tmp_path / "y.npy", mmap_mode="r")
    ratings = RaggedGroups(STUDENT, plates=PLATES, members={"y": y}, size=5)
    assert np.shares_memory(ratings.members["y"], y)
    assert ratings([3]).kwargs["y"].tolist() == [4, 49]


def test_capacities():
    ratings = of_students()
    assert ratings.capacity(1) == {"students": 1, "ratings": 4}
    assert ratings.capacity(3) == {"students": 3, "ratings": 8}
    assert ratings.capacity(99) == {"students": 5, "ratings": 9}
    batches = [[0, 3, 1], [2], np.array([4, 1])]
    assert ratings.capacity(iter(batches)) == {"students": 3, "ratings": 4}
    with pytest.raises(ValueError, match="no batch"):
        ratings.capacity([])
    with pytest.raises(ValueError, match="at least 1"):
        ratings.capacity(0)


def made(group=STUDENT, y=Y, plates=PLATES, **options):
    return RaggedGroups(group, plates=plates, members={"y": y}, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(), "0 to 4, but .* no member. If they exist.*size=5.*labels="),
        (lambda: made(STUDENT + 10**9), "no member"),
        (lambda: made(STUDENT - 1, size=5), "-1 to 3, outside 0 to 4.*without a group"),
        (lambda: made(size=4), "0 to 4, outside 0 to 3.*labels="),
        (lambda: made(size=6, groups={"a": AGE}), r"groups\['a'\].*: 5, 'size': 6"),
        (lambda: made(y=Y[1:], size=5), r"9 members, but members\['y'\] has 8"),
        (lambda: made(y=2.0, size=5), r"members\['y'\] is no array with a row"),
        (lambda: made(y=["a"] * 9, size=5), r"members\['y'\] is of type list"),
        (lambda: made(y=np.ma.array(Y), size=5), "'y'. is a masked array"),
        (lambda: made(STUDENT * 1.0), "float64.*astype"),
        (lambda: made(np.ma.array(STUDENT)), "group is a masked array"),
        (lambda: made(STUDENT[:, None]), r"vector.*shape \(9, 1\)"),
        (lambda: made(["a", None] * 4 + ["a"]), "NoneType.*without a group"),
        (lambda: made(labels=[0, 2, 3]), "holds .*4.*, which is none of labels"),
        (lambda: made(labels=[0, 2, 3, 4, 4]), "each group once"),
        (lambda: made(size=5, count="y"), r"called \['y'\]"),
        (lambda: made(size=5)([5]), r"'students' \(size 5\) run from 5 to 5"),
        (lambda: made(size=5)([-1]), r"'students' \(size 5\) run from -1 to -1"),
        (lambda: made(size=5)([True, False]), "type bool.*flatnonzero"),
        (lambda: made(size=5)([1]), "holds no row of plate 'ratings'"),
        (lambda: made(size=5)([2], y=3), r"\['y'\] are arguments that"),
        (
            lambda: made(size=5)([2], capacity={"n": 3}),
            r"names \['n'\].*'ratings', 'st",
        ),
    ],
)
def test_mistakes_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ training

GROUPS = 20
DRAW = np.random.default_rng(0)
OWN = DRAW.permutation(np.repeat(np.arange(GROUPS), np.arange(GROUPS) % 7 + 1))
DATA = (DRAW.normal(size=GROUPS)[OWN] + DRAW.normal(size=len(OWN))).astype("f4")


def grouped(idx, group, count, y):
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("students", GROUPS, subsample_size=len(idx)):
        a = numpyro.sample("a", dist.Normal(mu, 1))
    with handlers.scale(scale=GROUPS / count), numpyro.plate("ratings", len(y)):
        numpyro.sample("y", dist.Normal(a[group], 0.5), obs=y)


RATINGS = RaggedGroups(OWN, plates=PLATES, members={"y": DATA}, rows="idx")


def svi_of_groups(step_size=0.02):
    optimizer = optax.exponential_decay(step_size, 600, 0.05)
    return SubsampleSVI(
        grouped, AutoDelta(grouped), optax.adam(optimizer), Trace_ELBO()
    )


def shuffled(epoch):
    return np.split(
        np.random.default_rng(epoch).permutation(GROUPS), range(6, GROUPS, 6)
    )


def test_losses_are_those_of_all_members_by_hand():
    """Weighed by how often batches hold a group, they add up to the full loss."""
    svi, parts = svi_of_groups(), shuffled(0)
    capacity = RATINGS.capacity(6)
    batches = [RATINGS(part, capacity=capacity) for part in parts]
    state = svi.init(jax.random.key(0), batches[0])
    params = svi.get_params(state)
    evaluate = jax.jit(svi.evaluate)
    losses = [evaluate(state, batch) for batch in batches]
    mu, a = params["mu_auto_loc"], params["a_auto_loc"]
    likelihood = norm.logpdf(DATA, a[OWN], 0.5).sum()
    expected = norm.logpdf(mu, 0, 2) + norm.logpdf(a, mu, 1).sum() + likelihood
    weights = [len(part) / GROUPS for part in parts]
    np.testing.assert_allclose(-np.dot(weights, losses), expected, rtol=1e-5)


def posterior_mode():
    """Solve for the mode of mu and all a: both are normal."""
    n = np.bincount(OWN)
    precision = np.diag(np.append(1 + 4 * n, GROUPS + 1 / 4).astype(float))
    precision[-1, :-1] = precision[:-1, -1] = -1
    return np.linalg.solve(precision, np.append(4 * np.bincount(OWN, DATA), 0))


def loader(kind):
    make = partial(RATINGS, capacity=RATINGS.capacity(6))
    if kind == "function":
        return lambda epoch: map(make, shuffled(epoch))
    dataset = grain.MapDataset.range(GROUPS).seed(0).shuffle().batch(6).map(make)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1))


def test_fit_ends_at_the_posterior_mode_with_one_compilation():
    result = svi_of_groups(0.1).fit(
        jax.random.key(0), loader("function"), 150, progress_bar=False
    )
    assert result.compilations == 1
    found = np.append(result.params["a_auto_loc"], result.params["mu_auto_loc"])
    np.testing.assert_allclose(found, posterior_mode(), atol=0.05)


def test_fit_from_a_loader_of_grain():
    svi = svi_of_groups()
    result = svi.fit(jax.random.key(0), loader("grain"), 2, progress_bar=False)
    assert result.losses.shape == (8,) and result.compilations == 1
