"""Data have to stand in the plates that their batch names, and at these axes."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, minibatch

USERS, ITEMS = 20, 30


def crossed(table, users_at=-2):
    users = numpyro.plate("users", USERS, len(table), dim=users_at)
    items = numpyro.plate("items", ITEMS, table.shape[1], dim=-3 - users_at)
    with users:
        of_user = numpyro.sample("u", dist.Normal(0, 1))
    with users, items:
        numpyro.sample("y", dist.Normal(of_user, 1), obs=table)


def loss(model, batch, jit=True):
    svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), batch)
    return float((jax.jit(svi.evaluate) if jit else svi.evaluate)(state, batch))


def block(count, capacity):
    users, items = np.arange(count), np.arange(3)
    return minibatch(
        np.ones((count, 3), "float32"),
        rows={"users": users, "items": items},
        along={"users": 0, "items": {0: 1}},
        capacity=capacity,
    )


@pytest.mark.parametrize(("count", "capacity", "jit"), [(2, 8, True), (3, None, False)])
def test_a_transposed_block_that_fits_is_refused(count, capacity, jit):
    loss(crossed, block(count, capacity), jit)

    def transposed(table):
        crossed(table, users_at=-1)

    with pytest.raises(ValueError, match="'users' with axis 0, .* dim -1, which is ax"):
        loss(transposed, block(count, capacity), jit)


def test_padding_outside_of_its_plate_is_refused():
    rows = np.arange(5)

    def model(y, of_rows=True, mask=True):
        with numpyro.plate("rows", 40, len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
        other = numpyro.plate("rows" if of_rows else "others", 40, len(y))
        with other, handlers.mask(mask=mask) if mask is not True else other:
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    def apart(y):
        model(y, of_rows=False)

    def masked(y):
        model(y, of_rows=False, mask=np.arange(len(y)) < 5)

    def batch(capacity, names=("rows",)):
        return minibatch(
            np.ones(5, "float32"),
            rows=dict.fromkeys(names, rows),
            along=dict.fromkeys(names[-1:], 0),
            capacity=capacity,
        )

    assert loss(apart, batch(None)) == pytest.approx(loss(model, batch(9)))
    with pytest.raises(ValueError, match="outside of that plate, where the padding"):
        loss(apart, batch(9))
    both = loss(apart, batch(9, ("rows", "others")))
    assert both == pytest.approx(loss(model, batch(9)))
    loss(masked, batch(9))
