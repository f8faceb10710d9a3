"""Programs that plain NumPyro runs, run here too: host code, names, effects."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from models import N, plate_of
from numpyro_dynamic_subsample import dynamic_subsample

FORMS = ["wrapper", "context"]


# ------------------------------------------------------------------ host code


# ------------------------------------------------------------------ names


# ------------------------------------------------------------------ effects


# ------------------------------------------------------------------ posterior methods


def sliced(x):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("double mu", 2 * mu)
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.deterministic("gap", z - x)
        numpyro.sample("y", dist.Normal(z, 1), obs=x)
    numpyro.deterministic("sum of z", z.sum())


# ------------------------------------------------------------------ settings of guides


# ------------------------------------------------------------------ create_plates


# ------------------------------------------------------------------ guides unserved


# ------------------------------------------------------------------ drawn rows


