"""What a fit starts from: a random key, initial values, and what they lack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, trace
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState

from ..effect import internals
from ..effect.guides import has_parts, set_up_alone
from ..effect.internals import Tracer
from ..effect.reading import hidden_run
from .programs import EXACTLY, compiled


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


def check_seen(svi: SVI) -> None:
    """Check that an ``SVI`` can read a state.

    Raises
    ------
    ValueError
        If it has not seen the model, so that it does not know the parameters.
    """
    if svi.constrain_fn is None:
        raise ValueError(
            f"This {type(svi).__name__} has not seen the model yet, and cannot read a "
            "state. Call svi.init(key, batch) once, with any batch. The state that it "
            "returns is not needed."
        )


def check_state(svi: SVI, state: SVIState) -> None:
    """Check that a state is one of this model, guide and optimizer.

    Raises
    ------
    ValueError
        If it has other parameters, or the optimizer's state another structure.
    """
    given: Any = jax.tree.structure(state.optim_state)
    try:
        params = svi.optim.get_params(state.optim_state)
        expected = jax.tree.structure(jax.eval_shape(svi.optim.init, params))
    except Exception:
        params, expected = {}, None
    constrain: Any = svi.constrain_fn
    names = constrain.args[0].keys()
    if params and params.keys() != names:
        raise ValueError(
            f"The state has the parameters {sorted(params)}, but model and guide have "
            f"{sorted(names)}. Give a state of this model and guide."
        )
    if given != expected:
        raise ValueError(
            f"The state is not one of this {type(svi).__name__}'s optimizer: it has "
            f"the structure {given}, and not {expected}. Restore a checkpoint to the "
            "structure of svi.init(key, batch)."
        )


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
    state = None
    # What the program cannot hold, and what is wrong, NumPyro's own way shows.
    with suppress(Exception):
        state = _in_one_program(svi, init, rng_key, args, kwargs)
    if state is not None:
        return state
    try:
        return jax.tree.map(jnp.copy, init(rng_key))
    except (RuntimeError, ValueError) as error:
        what = str(error).partition(". ")[0].rstrip(".")
        if "valid initial parameters" not in what and " got invalid " not in what:
            raise
        where = _where_not_finite(svi.model, args, kwargs)
        if where is None:
            raise
        raise type(error)(f"{what}: {where}.") from error


def _in_one_program(
    svi: SVI,
    init: Callable[[jax.Array], SVIState],
    rng_key: jax.Array,
    args: tuple,
    kwargs: dict[str, Any],
) -> SVIState | None:
    guide: Any = svi.guide
    autoguide = guide.fn
    if not issubclass(type(autoguide), AutoGuide) or has_parts(autoguide):
        return None
    *_, of_guide = jax.random.split(rng_key, 3)
    keys = seed(rng_seed=of_guide)

    def called_later(*args: Any, **kwargs: Any) -> Any:
        # With the keys that the first call has left, once the guide is set up.
        with seed(rng_seed=keys.rng_key):
            return guide(*args, **kwargs)

    def find(rng_key: jax.Array) -> SVIState:
        # A step may be allowed to overwrite the state, but not what the guide keeps.
        return jax.tree.map(jnp.copy, init(rng_key))

    with internals.undone_on_error(autoguide):
        if autoguide.prototype_trace is None:
            with keys:
                set_up_alone(autoguide, svi.model, args, kwargs)
        with internals.replaced(svi, guide=called_later):
            program = compiled(find, rng_key, options=EXACTLY)
            state = program(rng_key)
        constrain: Any = svi.constrain_fn
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(constrain.args)):
            raise NotImplementedError("a constraint is computed in the program")
    return state


def _where_not_finite(
    model: Callable, args: tuple, kwargs: dict[str, Any]
) -> str | None:
    """Say which site has no density, and in which row."""
    with hidden_run(), trace() as sites:
        model(*args, **kwargs)
        found = [s for s in sites.values() if s["type"] == "sample"]
        # The data first, as they are the reason for the rest.
        for what in ("value", "log density"):
            for site in found:
                values = site["value"]
                if what == "value" and not site["is_observed"]:
                    continue
                event_dim = site["fn"].event_dim
                if what != "value":
                    values, event_dim = site["fn"].log_prob(values), 0
                values = np.asarray(values)
                places = np.argwhere(~np.isfinite(values))
                if len(places):
                    return _say(site, what, values, places[0], event_dim, sites)
    return None


def _say(
    site: dict[str, Any],
    what: str,
    values: Any,
    place: np.ndarray,
    event_dim: int,
    sites: Mapping[str, Any],
) -> str:
    where = []
    for frame in site["cond_indep_stack"]:
        axis = len(place) - event_dim + frame.dim
        if axis >= 0 and values.shape[axis] == frame.size:
            row = int(np.asarray(sites[frame.name]["value"])[place[axis]])
            where.append(f"row {row} of plate '{frame.name}'")
    number = np.asarray(values)[tuple(place)]
    in_rows = f" in {' and '.join(where)}" if where else ""
    return f"site '{site['name']}' has the {what} {number}{in_rows}"
