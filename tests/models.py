"""Models with local latents, each with the plates that its guide must have.

Every model takes one static argument, the subsample size; `plates` is the
hand-written `create_plates` that is correct for it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

N = 8
X = jnp.asarray(np.random.default_rng(0).normal(size=N))
GRID = jnp.arange(6.0)[:, None] + X


class Case(NamedTuple):
    model: object
    plates: object


def rows_plate(size):
    return numpyro.plate("n", N, subsample_size=size)


def one_latent(size):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with rows_plate(size) as idx:
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])


def events(size):
    with rows_plate(size) as idx:
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2, 2]).to_event(2))
        s = numpyro.sample("s", dist.LogNormal(0, 1))
        loc = p[..., 0] + w.sum((-1, -2))
        numpyro.sample("y", dist.Normal(loc, s), obs=X[idx])


def crossed_plates(size):
    return [
        numpyro.plate("a", 6, subsample_size=min(size, 6), dim=-2),
        numpyro.plate("b", N, subsample_size=size, dim=-1),
    ]


def crossed(size):
    a, b = crossed_plates(size)
    with a as i:
        za = numpyro.sample("za", dist.Normal(0, 1))
    with b as j:
        zb = numpyro.sample("zb", dist.Normal(0, 1))
    with a, b:
        zab = numpyro.sample("zab", dist.Normal(za + zb, 1))
        numpyro.sample("y", dist.Normal(zab, 1), obs=GRID[i[:, None], j])


def nested_plates(size):
    return numpyro.plate("n", N, subsample_size=size, dim=-2)


def nested(size):
    with numpyro.plate("groups", 3):
        g = numpyro.sample("g", dist.Normal(0, 1))
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(g, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx][:, None])


def every_primitive(size):
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with rows_plate(size):
        row = numpyro.param("row", jnp.zeros(N), event_dim=0)
        z = numpyro.deterministic("z", numpyro.sample("z_raw", dist.Normal(mu, 1)) * 2)
        numpyro.sample("y", dist.Normal(z + row, scale), obs=numpyro.subsample(X, 0))

    def step(state, y):
        state = numpyro.sample("state", dist.Normal(state, 1))
        numpyro.sample("obs", dist.Normal(state, 1), obs=y)
        return state, None

    scan(step, 0.0, jnp.ones(3))


CASES = {
    "one latent": Case(one_latent, rows_plate),
    "events": Case(events, rows_plate),
    "crossed plates": Case(crossed, crossed_plates),
    "nested plates": Case(nested, nested_plates),
    "every primitive": Case(every_primitive, rows_plate),
}
