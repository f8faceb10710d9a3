"""Hold a model, in a context, to the rows that its guide took, and to its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from numpyro.handlers import condition, replay

from ..batches.padding import valid_rows
from . import internals
from .internals import Handler, Tracer
from .plates import (
    PlateRows,
    all_in_order,
    as_rows,
    check_size,
    take_pinned_rows,
    take_rows_of_plates,
)

_REMEDY = (
    "Name the model that the guide is to follow, dynamic_subsample(guide, "
    "model=model), or pin the rows once, around guide and model alike."
)


class ModelCall(Handler):
    """Lets what runs in here use the rows of its plates wherever it has such.

    A model that runs against a guide gets the guide's rows, or an error where it wants
    others. It takes the rows of its plates from samples of all rows, and also from
    parameters and ``numpyro.subsample`` where NumPyro leaves these as they are.
    """

    # For some plates, the argument of the model that holds their rows, or their count.
    _rows: Mapping[str, str | int] = MappingProxyType({})
    _valid: Mapping[str, str | int] = MappingProxyType({})
    _unserved: str | None = None

    def __enter__(self) -> Any:
        self._unserved = None
        if internals.find(ModelCall) is None:
            self._changes = ExitStack()
            for change in _changes_of_numpyro():
                self._changes.enter_context(change)
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        unserved = isinstance(exc_value, TypeError | ValueError) and self._unserved
        if unserved and internals.passed_through_svi(traceback):
            exc_value.add_note(
                f"Plate {self._unserved} was made outside of an autoguide. If it "
                "belongs to a guide of your own, dynamic_subsample() does not know its "
                "model. Name it: dynamic_subsample(guide, model=model)."
            )
        if internals.find(ModelCall) is None:
            self._changes.close()

    def process_message(self, msg: dict[str, Any]) -> None:
        if internals.find_outermost(ModelCall) is not self:
            # Of nested contexts one acts.
            return
        if "plates" in msg:
            # A served guide's messages have its records, and need nothing here.
            self._unserved = None
            return
        if msg["type"] == "plate":
            self._check_rows(msg)
        elif msg["type"] == "sample":
            if msg["value"] is not None:
                self._take_rows(msg)
            self._count_valid_rows(msg)

    def _check_rows(self, msg: dict[str, Any]) -> None:
        replayed = internals.replayed()
        if replayed is None:
            self._unserved = f"'{msg['name']}' (size {msg['args'][0]})"
            return
        plate = internals.noted_plates(replayed.trace).get(msg["name"])
        if plate is None or plate.rows is None:
            return
        check_same_rows(msg, plate, pinned_in_model(msg))
        # `replay` does so too, but for the trace of `TraceEnum_ELBO`, which has no
        # plates.
        msg["value"] = plate.rows

    def _count_valid_rows(self, msg: dict[str, Any]) -> None:
        replayed = internals.replayed()
        noted = {} if replayed is None else internals.noted_plates(replayed.trace)
        plates = {name: own for name, own in noted.items() if own.valid is not None}
        if plates:
            counting = valid_rows({name: own.valid for name, own in plates.items()})
            for name, plate in plates.items():
                counting.subsamples[name] = plate.argument is not None
            counting.process_message(msg)

    def _take_rows(self, msg: dict[str, Any]) -> None:
        giver = internals.giver(msg)
        samples = internals.find(Samples)
        if isinstance(giver, condition):
            _refuse_ambiguous(msg)
        elif giver is None:
            # Other functions give values of the batch, such as those of MCMC.
            if msg["is_observed"] or samples is None or not samples.of_all_rows:
                return
        elif isinstance(giver, replay) or (samples and not samples.of_all_rows):
            return
        elif any(
            plate.name in (giver.data or {}) and plate.subsample_size == plate.size
            for plate in internals.plates_around()
        ):
            # With rows go values of these rows, as `multi_sample_guide` gives them.
            return
        msg["value"] = take_rows_of_plates(msg["value"], msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and not internals.is_default(msg["value"]):
            msg["value"] = as_rows(msg["name"], msg["args"][0], msg["value"])


class Samples(Handler):
    """Says whether samples that a model is given are of all rows, or of the batch."""

    def __init__(self, of_all_rows: bool) -> None:
        super().__init__()
        self.of_all_rows = of_all_rows


def _refuse_ambiguous(msg: dict[str, Any]) -> None:
    for plate in internals.plates_around():
        rows = internals.rows_of(plate)
        if plate.subsample_size == plate.size and not all_in_order(rows, plate.size):
            raise ValueError(
                f"All {plate.size} rows of plate '{plate.name}' are pinned, but not in "
                f"the plate's order, and `condition` gives the values of site "
                f"'{msg['name']}' there. They may be of all rows in that order, or of "
                "the batch. Give data to the site itself, obs=..., and latents of all "
                "rows to `substitute`."
            )


def _changes_of_numpyro() -> list[Any]:
    """Return what is changed in NumPyro's classes while a context is entered."""

    def noting_default(
        subsample: Callable, name: str, *args: Any
    ) -> tuple[int, jax.Array]:
        with _DefaultRows():
            return subsample(name, *args)

    def taking(postprocess: Callable) -> Callable:
        # NumPyro's plate is asked last, after every trace has noted the value, so that
        # parameters are noted with all their rows.
        @wraps(postprocess)
        def postprocess_message(plate: Any, msg: dict[str, Any]) -> None:
            postprocess(plate, msg)
            take_pinned_rows(plate, msg)

        return postprocess_message

    changes = [internals.plates_made_by(noting_default)]
    for cls in internals.PLATE_CLASSES:
        postprocess = taking(cls.postprocess_message)
        changes.append(internals.replaced(cls, postprocess_message=postprocess))
    return changes


class _DefaultRows(Handler):
    """Notes the rows that a plate has before any handler pins others."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["value"] is not None:
            internals.note_default(msg["value"])


def pinned_in_model(msg: dict[str, Any]) -> Any:
    """Return the rows that a handler inside of a replayed model pins, None if none."""
    made_as = internals.name_inside(msg["name"], internals.handlers_around())
    inside = internals.handlers_inside(internals.replayed())
    return internals.plate_outside(made_as, msg["args"][0], inside)["value"]


def check_same_rows(msg: dict[str, Any], plate: PlateRows, pinned: Any) -> None:
    """Refuse a plate of the model that wants other rows than its guide took.

    Parameters
    ----------
    msg : dict
        The message of the model's plate.
    plate : PlateRows
        What the plate took in the guide.
    pinned : array or None
        The rows that a handler inside of the model pins.
    """
    name, (size, argument) = msg["name"], msg["args"]
    rows: Any = plate.rows
    check_size(name, size, plate.size)
    if plate.pinned_by == "handler":
        # It pins the model's rows too.
        return
    if argument is not None and argument != rows.shape[0]:
        raise ValueError(
            f"The model asks plate '{name}' (size {size}) for {argument} rows, but the "
            f"guide that it runs against took {rows.shape[0]}. {_REMEDY}"
        )
    if pinned is None or pinned is rows:
        return
    if isinstance(pinned, Tracer) or isinstance(rows, Tracer):
        differ = plate.pinned_by is None
    else:
        differ = not np.array_equal(pinned, rows)
    if differ:
        raise ValueError(
            f"The model pins rows {_shortened(pinned)} of plate '{name}' (size "
            f"{size}), but the guide that it runs against took {_shortened(rows)}. "
            f"{_REMEDY}"
        )


def _shortened(rows: Any) -> str:
    if isinstance(rows, Tracer):
        return "that are arguments of the compiled step"
    return np.array2string(np.asarray(rows), threshold=8, edgeitems=3)
