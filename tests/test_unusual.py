"""Programs that are a little unusual, as users write them."""

import jax.numpy as jnp

PERMUTATION = jnp.array([3, 1, 5, 0, 4, 2, 7, 6])
