"""Set an autoguide up by its first call, where NumPyro's own way would not do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions.transforms import biject_to
from numpyro.handlers import substitute, trace
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDAIS,
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoSurrogateLikelihoodDAIS,
)
from numpyro.infer.initialization import init_to_value

from . import internals
from .calls import follow_model
from .internals import Handler
from .reading import full_size, hidden_run
from .rows import PlateRows


def set_up(guide: AutoGuide, call: follow_model) -> None:
    """Let a guide learn the structure of its model, and where its latents start.

    Parameters
    ----------
    guide : AutoGuide
        The guide, which has not been called yet.
    call : follow_model
        The call, which has read the model's plates.

    Raises
    ------
    ValueError
        If the guide needs one latent for every row, or the data of all rows, and
        these arguments do not bring them, or not in the plate's order.
    """
    _, args, kwargs = call.run
    plates = call.plates.values()
    # A part made with block(model, expose=...) does not see the plates of its sites.
    for plate in plates:
        internals.full_sizes(guide).setdefault(plate.name, plate.size)
    subsampled = {p.name for p in plates if p.subsample_size != p.size}
    reordered = [plate for plate in plates if plate.is_reordered]
    if isinstance(guide, AutoContinuous):
        if reordered and evaluates_first_data(guide):
            _refuse_reordered(guide, reordered[0])
        # AutoDAIS evaluates the likelihood of the whole data; the others only need
        # one latent for every row.
        if subsampled and not needs_whole_likelihood(guide):
            subsampled &= _plates_of_latents(guide.model, args, kwargs)
        if subsampled:
            _set_up_at_full_size(guide, min(subsampled), call, args, kwargs)
            return
    from_values = getattr(guide.init_loc_fn, "func", None) is init_to_value
    with _known_rows(call):
        if from_values and subsampled and not isinstance(guide, AutoContinuous):
            _set_up_from_values(guide, args, kwargs)
        elif reordered or not isinstance(guide, AutoGuideList):
            # A list that NumPyro sets up by itself checks its parts' deterministic
            # sites.
            internals.set_up_prototype(guide, args, kwargs)


@contextmanager
def _known_rows(call: follow_model) -> Generator[None]:
    """Give plates the rows that are known, since NumPyro hides pins from a first run.

    The plates spend their keys all the same, and shuffle nothing.
    """
    known = {n: p.rows for n, p in call.plates.items() if p.rows is not None}
    giving = _give_rows(known)

    def give(subsample: Callable, *args: Any) -> tuple[int, jax.Array]:
        with giving:
            return subsample(*args)

    with internals.plates_made_by(give):
        yield


class _give_rows(Handler):
    """Gives plates the rows that are known; entered innermost."""

    def __init__(self, rows: dict[str, jax.Array]) -> None:
        super().__init__()
        self._rows = rows
        # One function for all messages of a plate: those of the branches of a `cond`
        # have to be equal.
        self._draws = {name: partial(_take, own) for name, own in rows.items()}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            rows = self._rows.get(msg["name"])
            if rows is not None and len(rows) == msg["args"][1]:
                msg["fn"] = self._draws[msg["name"]]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        # By now handlers in the model have changed the name, if they do.
        if msg["type"] == "plate" and msg["name"] in self._rows:
            msg["value"] = self._rows[msg["name"]]


def _take(rows: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return rows


def needs_whole_likelihood(guide: AutoGuide) -> bool:
    """Tell whether a guide evaluates the likelihood of all rows in each call."""
    return isinstance(guide, AutoDAIS) and not isinstance(
        guide, AutoSurrogateLikelihoodDAIS
    )


def evaluates_first_data(guide: AutoGuide) -> bool:
    """Tell whether a guide goes on to evaluate the model on its first data."""
    return needs_whole_likelihood(guide) or isinstance(guide, AutoLaplaceApproximation)


def _refuse_reordered(guide: AutoGuide, plate: PlateRows) -> None:
    raise ValueError(
        f"{type(guide).__name__} takes the data of its first call for those of all "
        f"rows in the plate's order, but the first call pins the {plate.size} rows of "
        f"plate '{plate.name}' (size {plate.size}) in another one. Make the first "
        f"call, svi.init, with rows and data in order, arange({plate.size}); later "
        "calls may bring batches in any order."
    )


def _plates_of_latents(
    model: Callable, args: tuple, kwargs: dict[str, Any]
) -> set[str]:
    with hidden_run(), trace() as sites:
        model(*args, **kwargs)
    return {
        frame.name
        for site in sites.values()
        if site["type"] == "sample" and not site["is_observed"]
        for frame in site["cond_indep_stack"]
    }


def _set_up_at_full_size(
    guide: AutoContinuous,
    name: str,
    call: follow_model,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    try:
        with hidden_run(), full_size():
            guide.model(*args, **kwargs)
    except Exception as error:
        plate = call.plate(name)
        raise ValueError(
            f"{type(guide).__name__} is one joint distribution over all rows of plate "
            f"'{name}' (size {plate.size}), so the first call has to run the model at "
            f"full size. With these arguments, which bring {plate.subsample_size} "
            f"rows, it cannot: {error}. Make the first call, svi.init, with the full "
            "data; later calls may bring batches of any size."
        ) from error
    with full_size():
        internals.set_up_prototype(guide, args, kwargs)


def _set_up_from_values(guide: AutoGuide, args: tuple, kwargs: dict[str, Any]) -> None:
    """Start every row where ``init_to_value`` says, those outside the batch too."""
    init_loc_fn: Any = guide.init_loc_fn
    values = init_loc_fn.keywords.get("values", {})
    with hidden_run(), trace() as sites, substitute(data=values):
        guide.model(*args, **kwargs)
    # Where values of all rows are given, `substitute` has taken those of the batch.
    known = {name: sites[name]["value"] for name in values.keys() & sites.keys()}
    of_batch = values | known
    with internals.replaced(guide, init_loc_fn=partial(init_to_value, values=of_batch)):
        internals.set_up_prototype(guide, args, kwargs)
    if isinstance(guide, AutoGuideList):
        return
    prototype: Any = guide.prototype_trace
    start = internals.initial_values(guide)
    for name, init_loc in start.items():
        if name not in values:
            continue
        value = values[name]
        if not isinstance(guide, AutoDelta):
            value = biject_to(prototype[name]["fn"].support).inv(value)
        shape = jnp.shape(init_loc)
        # Values of the first batch stay as NumPyro repeats them.
        if len(jnp.shape(value)) < len(shape) or jnp.shape(value) == shape:
            start[name] = jnp.broadcast_to(value, shape)
