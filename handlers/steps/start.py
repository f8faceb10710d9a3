"""What a fit starts from: a random key, initial values, and what they lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.handlers import seed
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState

from ..effect import internals
from ..effect.guides import has_parts, set_up_alone
from ..effect.internals import Handler, Tracer


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


class _KeysSpent(Handler):
    """Counts the random keys that are asked for."""

    count = 0

    def process_message(self, msg: dict[str, Any]) -> None:
        self.count += msg["type"] == "prng_key"


def init_at_once(
    svi: SVI,
    init: Callable[[jax.Array], SVIState],
    rng_key: jax.Array,
    args: tuple,
    kwargs: dict[str, Any],
) -> SVIState:
    """Initialise in one program, where NumPyro runs guide and model step by step.

    Parameters
    ----------
    svi : numpyro.infer.SVI
        Whose initial state is wanted.
    init : callable
        NumPyro's ``init`` on the batch, a function of the key.
    rng_key : array
        The key.
    args, kwargs : tuple, dict
        What model and guide are called with.

    Returns
    -------
    SVIState
        The state that `init` returns, of arrays that nothing else holds.
    """
    guide: Any = svi.guide
    autoguide = guide.fn
    try:
        if not issubclass(type(autoguide), AutoGuide) or has_parts(autoguide):
            raise NotImplementedError
        with internals.undone_on_error(autoguide):
            keys = _KeysSpent()
            if autoguide.prototype_trace is None:
                *_, of_guide = jax.random.split(rng_key, 3)
                with seed(rng_seed=of_guide), keys:
                    set_up_alone(autoguide, svi.model, args, kwargs)

            def called_later(*args: Any, **kwargs: Any) -> Any:
                # The keys that the first call spends on setting itself up.
                for _ in range(keys.count):
                    numpyro.prng_key()
                return guide(*args, **kwargs)

            def find(rng_key: jax.Array) -> SVIState:
                return jax.tree.map(jnp.copy, init(rng_key))

            with internals.replaced(svi, guide=called_later):
                state = internals.compiled(find, rng_key, exactly=True)(rng_key)
            if any(isinstance(x, Tracer) for x in jax.tree.leaves(_transforms(svi))):
                raise NotImplementedError
            return state
    except Exception:
        # What the program cannot hold, and what is wrong, NumPyro's own way shows.
        return jax.tree.map(jnp.copy, init(rng_key))


def _transforms(svi: SVI) -> Any:
    constrain: Any = svi.constrain_fn
    return constrain.args
