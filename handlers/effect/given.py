"""Take rows where a handler gives a site the values of all rows.

``substitute``, ``condition`` and ``do`` set a site's value after the plates around the
site have put their frames on its message, whatever ``block`` stands further out. So
these three classes take the rows, and no handler has to see the site.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax.numpy as jnp
from numpyro.handlers import condition, do, substitute

from . import internals
from .calls import follow_model, hold_to_guide, predicting
from .rows import RowsError, all_in_order, take_rows

GIVERS = (substitute, condition, do)


def taking_rows(process: Callable) -> Callable:
    """Return the ``process_message`` of a giver, made to take rows."""

    @wraps(process)
    def process_message(giver: Any, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            process(giver, msg)
            return
        before, frames, scale = msg["value"], msg["cond_indep_stack"], msg["scale"]
        intervenes = internals.intervenes(giver, msg)
        if intervenes:
            # NumPyro runs all handlers on a copy of the message, those too that have
            # added their frames and scales to it before.
            msg["cond_indep_stack"], msg["scale"] = [], None
        process(giver, msg)
        if intervenes:
            msg["cond_indep_stack"], msg["scale"] = frames, scale
        if msg["value"] is not None and msg["value"] is not before:
            msg["value"] = _rows_of(msg["value"], giver, msg)

    return process_message


def _rows_of(value: Any, giver: Any, msg: dict[str, Any]) -> Any:
    site = msg["name"].removesuffix("__CF")  # as `do` calls what it replaces
    frames = {(frame.dim, frame.size) for frame in msg["cond_indep_stack"]}
    call = internals.find(follow_model)
    if call is not None and call.reading and frames:
        call.needs_context = True
    for plate in internals.plates_around():
        # By place: a scope may have changed the names on the way.
        if (plate.dim, plate.subsample_size) not in frames:
            continue
        rows = internals.rows_of(plate)
        if all_in_order(rows, plate.size):
            continue
        axis = plate.dim - msg["fn"].event_dim
        of_all = jnp.ndim(value) >= -axis and jnp.shape(value)[axis] == plate.size
        if plate.subsample_size == plate.size:
            of_all = of_all and _is_of_all_rows(giver, plate, site)
        if of_all:
            what = f"gives site '{site}' values of all {plate.size} rows of"
            _check_reach(giver, what, plate)
        elif isinstance(giver, do):
            what = f"replaces site '{site}', with a scale that NumPyro counts twice, in"
            _check_reach(giver, what, plate)
        if of_all:
            value = take_rows(value, rows, plate.size, axis)
    return value


def _is_of_all_rows(giver: Any, plate: Any, site: str) -> bool:
    """Tell what a value is of where the plate takes all rows in another order."""
    prediction = internals.find(predicting)
    if prediction is not None and not isinstance(giver, do) and prediction.gives(site):
        return prediction.of_all_rows
    if internals.find(follow_model) is not None and not isinstance(giver, condition):
        # What runs within a guide gives values of the batch.
        return False
    if isinstance(giver, substitute):
        # Other functions give values of the batch, such as those of MCMC. With rows go
        # values of these rows, as `multi_sample_guide` gives them.
        return giver.data is not None and plate.name not in giver.data
    raise RowsError(
        f"All {plate.size} rows of plate '{plate.name}' are pinned, but not in the "
        f"plate's order, and `{type(giver).__name__}` gives the values of site "
        f"'{site}' there. They may be of all rows in that order, or of the batch. Give "
        "data to the site itself, obs=..., and latents of all rows to `substitute`."
    )


def _check_reach(giver: Any, what: str, plate: Any) -> None:
    """Refuse what the model would not get where only the guide is wrapped."""
    call = internals.find(follow_model)
    if call is None or internals.find(hold_to_guide) is not None:
        return
    if call.reading or giver in call.around:
        raise RowsError(
            f"`{type(giver).__name__}` {what} plate '{plate.name}', which takes "
            f"{plate.subsample_size} of its {plate.size} rows. A wrapped guide alone "
            "cannot mend this in the model: enter dynamic_subsample() around the step, "
            "or use SubsampleSVI."
        )
