"""Rewrite the plates of a guide, during one call of it, to those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from . import internals
from .internals import CondIndepStackFrame, Handler
from .model_call import ModelCall
from .plates import (
    PlateRows,
    RowsError,
    as_rows,
    check_size,
    read_plates,
    take_pinned_rows,
)


class GuideCall(Handler):
    """Holds the record of every plate's rows while a guide runs, and rewrites by it.

    Parameters
    ----------
    model : callable
        The model whose plates the guide follows.
    args, kwargs : tuple, dict
        What model and guide are called with.
    needs : iterable of str, optional
        The plates that the guide is known to need: a reading of the model then ends
        with the last of them.
    plates : dict of str to PlateRows, optional
        The records, where they are known already.
    counts : dict of str to int, optional
        For some plates, how many of their rows are valid.

    Attributes
    ----------
    plates : dict of str to PlateRows
        The records, by the plates' names inside of the guide.
    latents : dict of str to list
        By plate, the latent sites of the guide in it.
    in_context : bool
        Whether a context stands around, which checks and rewrites the model's plates.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        needs: Iterable[str] | None = None,
        plates: dict[str, PlateRows] | None = None,
        counts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._counts = counts or {}
        self.run = (model, args, kwargs)
        self.plates = dict(plates or {})
        self.latents: dict[str, list[str]] = {}
        self._needs = needs
        self._of_all_rows = False
        self._made: set[str] = set()
        self._read_whole = False
        self._around = internals.handlers_around()
        self.in_context = internals.find(ModelCall) is not None

    def read(self, until: Iterable[str] | None = None) -> bool:
        """Read the model's plates: all, or until these have been seen.

        Returns whether that was possible: a guide may be asked for its latents without
        the model's arguments, and then takes all rows.
        """
        model, args, kwargs = self.run
        until = None if until is None else set(until)
        if until is None and self._read_whole:
            return True
        try:
            read = read_plates(model, args, kwargs, self._around, until=until)
        except RowsError:
            raise
        except Exception:
            if args or kwargs:
                raise
            self._of_all_rows = True
            return False
        for name, plate in read.items():
            known = self.plates.get(name, plate)
            gathers = known.gathers or plate.gathers
            self.plates[name] = replace(known, gathers=gathers)
        self._read_whole = until is None
        return True

    def plate(self, name: str, size: int | None = None) -> PlateRows:
        """Return the record of a plate, by its name and size in the guide."""
        if name not in self.plates and size is not None and self.in_context:
            # Nothing has to be read: the model's own plate is checked when it runs.
            rows = internals.plate_outside(name, size, self._around)["value"]
            if rows is not None:
                rows = as_rows(name, size, rows)
                self.plates[name] = PlateRows(name, size, len(rows), rows, "handler")
        if name not in self.plates:
            self.read(None if self._needs is None else {*self._needs, name})
        if self._of_all_rows and size is not None:
            self.plates.setdefault(name, PlateRows(name, size, None))
        if name not in self.plates:
            raise ValueError(
                f"The guide has a plate '{name}' that the model no longer has; the "
                f"model's plates are {sorted(self.plates)}. Build a new guide for "
                "the changed model, or name the model that it follows: "
                "dynamic_subsample(guide, model=model)."
            )
        return self.plates[name]

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self._rewrite(msg)
        elif msg["type"] == "sample":
            for frame in msg["cond_indep_stack"]:
                self._check_dim(frame)
                if not msg["is_observed"] and not msg["infer"].get("is_auxiliary"):
                    self.latents.setdefault(frame.name, []).append(msg["name"])
        # So the records reach the model that is replayed against this guide.
        msg["plates"] = self.plates

    def _rewrite(self, msg: dict[str, Any]) -> None:
        name = msg["inside"] = msg["name"]
        size, subsample_size = msg["args"]
        own = size if subsample_size is None else subsample_size
        plate = self._shared(self.plate(name, size))
        check_size(name, plate.size, size)
        pinned = self._pinned_in_guide(name, size)
        if pinned is not None and plate.pinned_by is None:
            if len(pinned) != plate.subsample_size:
                raise ValueError(
                    f"The guide pins {len(pinned)} rows of plate '{name}' (size "
                    f"{size}), but the model asks for {plate.subsample_size}. Pin the "
                    "rows once, around guide and model alike."
                )
            plate = replace(plate, rows=as_rows(name, size, pinned), pinned_by="guide")
        # A plate gets a key from `seed` if it has no rows yet. Those that a handler
        # outside pins come later, so with them the plate gets its key, as NumPyro's do;
        # but once in a call, as if all parts of a guide shared plates made by hand.
        later = plate.pinned_by == "handler" and name not in self._made
        if plate.rows is not None and not later:
            msg["value"] = plate.rows
        elif plate.takes_all:
            in_order = msg["value"] if own == size else jnp.arange(size)
            msg["value"] = internals.note_default(in_order)
        else:
            msg["value"] = None
            msg["fn"] = self._drawing(name, msg["fn"])
        msg["args"] = (size, plate.argument)
        self.plates[name] = plate

    def _shared(self, plate: PlateRows) -> PlateRows:
        """Return the record of the same plate in an earlier guide of the same trace.

        So guides that are served one by one draw their rows once.
        """
        if plate.rows is not None or plate.takes_all:
            return plate
        outside = internals.plate_outside(plate.name, plate.size, self._around)["name"]
        trace = internals.trace_around(self._around)
        earlier = internals.noted_plates(trace).get(outside)
        if earlier is None or earlier.subsample_size != plate.subsample_size:
            return plate
        return replace(plate, rows=earlier.rows, drawn=earlier.drawn)

    def _pinned_in_guide(self, name: str, size: int) -> Any:
        inside = internals.handlers_inside(self)
        made_as = internals.name_inside(name, inside)
        return internals.plate_outside(made_as, size, inside)["value"]

    def _drawing(self, name: str, draw: Callable) -> Callable:
        def drawn(size: int, subsample_size: int, rng_key: Any = None) -> jax.Array:
            plate = self.plates[name]
            if plate.rows is not None:
                return plate.rows
            self.plates[name] = replace(plate, drawn=True)
            # A seed handler inside of the guide may have seen a plate of all rows,
            # which needs no key; any other has given one by now.
            key = numpyro.prng_key() if rng_key is None else rng_key
            return draw(size, subsample_size, rng_key=key)

        return drawn

    def _check_dim(self, frame: CondIndepStackFrame) -> None:
        plate = self.plates.get(frame.name)
        if plate is not None and plate.dims and frame.dim not in plate.dims:
            dims = " and ".join(map(str, sorted(plate.dims)))
            raise ValueError(
                f"Plate '{frame.name}' (size {plate.size}) is at dim {dims} in the "
                f"model and at dim {frame.dim} in the guide. Give the plate one "
                "explicit dim in the model, or build a new guide for the changed model."
            )

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            plate = self.plates[msg["inside"]]
            size, rows = plate.size, msg["value"]
            if not isinstance(rows, jax.Array) and not self.in_context:
                raise ValueError(
                    f"The rows pinned for plate '{plate.name}' (size {size}) are of "
                    f"type {type(rows).__name__}, and NumPyro's plates take JAX arrays "
                    f"only. Pin jnp.asarray(rows)."
                )
            if plate.rows is not None and plate.pinned_by == "handler":
                # A scope outside may have hidden the plate from the handler.
                rows = plate.rows
            elif not internals.is_default(rows):
                rows = as_rows(plate.name, size, rows)
            msg["value"] = rows
            # If a handler outside pins another number of rows than the model asks for,
            # NumPyro warns of it once, at the model's own plate.
            msg["args"] = (size, rows.shape[0])
            count = self._counts.get(msg["inside"])
            self.plates[msg["inside"]] = replace(
                plate, name=msg["name"], rows=rows, valid=count
            )
            self._made.add(msg["inside"])
        elif not self.in_context:
            for plate in internals.plates_around(self):
                take_pinned_rows(plate, msg)
