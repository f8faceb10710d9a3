"""What a fit starts from: a random key, initial values, and what they lack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_key(rng_key: Any) -> None:
    """Check that the first argument of a method is a random key.

    Raises
    ------
    TypeError
        If it is not.
    """
    if isinstance(rng_key, jax.Array | np.ndarray):
        dtype = rng_key.dtype
        is_typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if (is_typed and rng_key.ndim == 0) or (dtype == np.uint32 and rng_key.ndim):
            return
    what = f"the integer {rng_key}" if isinstance(rng_key, int) else ""
    raise TypeError(
        "The first argument is a random key: jax.random.key(0). Here it is "
        f"{what or type(rng_key).__name__}."
    )
