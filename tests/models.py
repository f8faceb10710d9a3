"""Models, plates, data and guides that several tests have in common."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoGuideList, AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample

N = 8
X = jnp.asarray(np.random.default_rng(0).normal(size=N))
TRUTH = jnp.arange(float(N))
GRID = jnp.arange(6.0)[:, None] + X


class Tensor:
    """What torch's tensors have in common with arrays."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


def guide_list(model, parts, *, hide=(), **options):
    """A list with a guide for each group of sites: ``{"z y": AutoNormal, ...}``."""
    guide = AutoGuideList(model)
    for names, make in parts.items():
        others = [name for key in parts if key != names for name in key.split()]
        guide.append(make(handlers.block(model, hide=[*hide, *others]), **options))
    return guide


def svi_of(model, guide=AutoNormal, form="wrapper", loss=None, optim=None, **options):
    """With a wrapped guide, `SubsampleSVI`, or neither, for a context around."""
    guide = guide(model) if isinstance(guide, type) else guide
    if form == "wrapper":
        of_guide = None if isinstance(guide, AutoGuide) else model
        guide = dynamic_subsample(guide, model=of_guide)
    svi = SubsampleSVI if form == "SubsampleSVI" else SVI
    return svi(model, guide, optim or optax.sgd(0.1), loss or Trace_ELBO(), **options)


def rows_moved(svi, state, *args, name="z_auto_loc"):
    """Which rows of a parameter a compiled step changes."""
    # The arguments stay concrete, as host code wants them.
    after, _ = jax.jit(lambda state: svi.update(state, *args))(state)
    before, after = (svi.get_params(own)[name] for own in (state, after))
    return np.flatnonzero(after != before).tolist()


def initialised(guide, size=4):
    with handlers.seed(rng_seed=0):
        guide(size)
    return guide


# ------------------------------------------------------------------ plates


def rows_plate(size):
    return numpyro.plate("n", N, subsample_size=size)


def plate_of(rows, size=N, *, name="n", pinned=True):
    """A plate for as many rows as there are, pinned to them or not."""
    with handlers.substitute(data={name: rows} if pinned else {}):
        return numpyro.plate(name, size, subsample_size=len(rows))


def plate(x, rows):
    return rows_plate(len(x))


def pinned_plate(x, rows):
    return plate_of(rows)


# ------------------------------------------------------------------ of a sliced batch


def hierarchy(size=N, name="n", noise=1.0):
    """A model of a batch of data: a mean, and a latent for each row."""

    def model(batch, noise=noise):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate(name, size, subsample_size=len(batch)):
            z = numpyro.sample("z", dist.Normal(mu, 1))
            numpyro.sample("y", dist.Normal(z, noise), obs=batch)

    return model


def independent(batch, size=N):
    """A latent for each row, and nothing else."""
    with numpyro.plate("n", size, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=batch)


# ------------------------------------------------------------------ of data and rows
#
# Where all is right, the latents of row i are trained towards the datum of row i.


def latent_and_obs(obs, name="z"):
    z = numpyro.sample(name, dist.Normal(0, 10))
    numpyro.sample(f"y_{name}", dist.Normal(z, 1), obs=obs)
    return z


def sliced(x, rows, make=plate):
    with make(x, rows):
        latent_and_obs(x)


def sliced_and_pinned(x, rows):
    sliced(x, rows, pinned_plate)


def indexing(x, rows, make=plate):
    with make(x, rows) as idx:
        z = latent_and_obs(TRUTH[idx])
        numpyro.deterministic("gap", z - TRUTH[idx])


def subsampling(x, rows, make=plate):
    with make(x, rows):
        latent_and_obs(numpyro.subsample(TRUTH, event_dim=0))


def two_latents(x, rows, make=plate):
    with make(x, rows) as idx:
        latent_and_obs(TRUTH[idx], "a")
        latent_and_obs(-TRUTH[idx], "z")


# ------------------------------------------------------------------ of a size
#
# Each takes one static argument, the subsample size.


class Case(NamedTuple):
    """A model, and the hand-written `create_plates` that is correct for it."""

    model: object
    plates: object


def local(size):
    with rows_plate(size) as idx:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])


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
