"""What `fit` says of validations and sizes, and goes on."""

import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoNormal

from models import hierarchy
from numpyro_dynamic_subsample import SubsampleSVI, minibatch

ROWS = 12
DATA = np.random.default_rng(0).normal(size=ROWS).astype("f4")

local = hierarchy(ROWS, "rows", 0.5)


def load(rows):
    return minibatch(DATA[rows], rows={"rows": np.asarray(rows)})


def said(model, batches, validation=None, guide=None, loss=None):
    guide = AutoNormal(model) if guide is None else guide
    svi = SubsampleSVI(model, guide, optax.adam(0.05), loss or Trace_ELBO())
    with warnings.catch_warnings(record=True, action="always") as found:
        key = jax.random.key(0)
        svi.fit(key, batches, 2, validation=validation, progress_bar=False)
    return [str(warning.message) for warning in found]


def amortised(y):
    numpyro.sample("mu", dist.Normal(numpyro.param("loc", 0.0), 0.1))
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        numpyro.sample("z", dist.Normal(numpyro.param("w", 0.5) * y, 0.5))


@pytest.mark.parametrize(
    ("rows", "guide", "warned"),
    [
        ([8, 9], None, True),
        ([7, 8], None, False),
        ([8, 9], amortised, False),
    ],
)
def test_validation_on_rows_that_are_never_trained(rows, guide, warned):
    batches = [load([0, 1, 2, 3]), load([4, 5, 6, 7])]
    found = said(local, batches, [load(rows)], guide)
    assert len(found) == warned
    assert all("No row of plate 'rows' in validation was trained" in t for t in found)


def mixture(y):
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(loc + k, 1), obs=y)


def test_many_sizes_are_told_once_with_what_the_objective_can_take():
    batches = [load(np.arange(count)) for count in (2, 3, 4)]
    [of_local] = said(local, batches)
    assert "3 shapes of batch, with 2, 3, 4 rows of plate 'rows'" in of_local
    assert "capacity={'rows': 4}" in of_local and "enumerates" not in of_local
    guide = AutoNormal(numpyro.handlers.block(mixture, hide=["k"]))
    [of_mixture] = said(mixture, batches, guide=guide, loss=TraceEnum_ELBO())
    assert "cannot be padded, cut batches of few sizes" in of_mixture
