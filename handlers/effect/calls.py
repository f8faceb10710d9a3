"""What happens to the messages of guide and model during one call of a guide."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from . import internals
from .internals import Handler, Tracer
from .reading import check_data, read_plates
from .rows import PlateRows, RowsError, as_rows, check_size

_REMEDY = (
    "Name the model that the guide is to follow, dynamic_subsample(guide, "
    "model=model), or pin the rows once, around guide and model alike."
)


# ------------------------------------------------------------------ of a guide


class follow_model(Handler):
    """Gives a guide's plates the sizes and rows that they have in the model.

    Parameters
    ----------
    model : callable
        The model whose plates the guide follows.
    args, kwargs : tuple, dict
        What model and guide are called with.
    plates : dict of str to PlateRows, optional
        The records, where they are known already.

    Attributes
    ----------
    run : tuple
        The model and what it is called with.
    plates : dict of str to PlateRows
        The records, by the plates' names inside of the guide.
    latents : dict of str to list
        By plate, the latent sites of the guide in it.
    around : list of Messenger
        The handlers around the call, the inner ones first.
    in_context : bool
        Whether a context stands around, which holds the model to the guide.
    reading : bool
        Whether the model is being read.
    needs_context : bool
        Whether in the model, as far as it was read, handlers give values to sites in
        plates, or parameters and ``numpyro.subsample`` hold rows.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        plates: dict[str, PlateRows] | None = None,
    ) -> None:
        super().__init__()
        self.run = (model, args, kwargs)
        self.plates = dict(plates or {})
        self.latents: dict[str, list[str]] = {}
        self.around = internals.handlers_around()
        self.in_context = internals.find(hold_to_guide) is not None
        self.reading = self.needs_context = False
        self._made: set[str] = set()
        self._read = False
        self._failure: Exception | None = None

    def read(self, *, needed: bool = True) -> None:
        """Read the model's plates, once.

        A guide may be asked for its latents without the model's arguments, and then
        takes all rows. If plates are not `needed`, it may also be called with what its
        model cannot run on.
        """
        _, *arguments = self.run
        if not self._read:
            self._read = self.reading = True
            try:
                read = read_plates(*self.run, self.around)
            except RowsError:
                raise
            except Exception as error:
                read, self._failure = {}, error
            finally:
                self.reading = False
            for name, plate in read.items():
                known = self.plates.get(name, plate)
                self.plates[name] = replace(known, gathers=plate.gathers)
                self.needs_context |= plate.gathers
        if self._failure is not None and needed and any(arguments):
            raise self._failure

    def plate(self, name: str, size: int | None = None) -> PlateRows:
        """Return the record of a plate, by its name and size in the guide."""
        if name not in self.plates and size is not None and self.in_context:
            # Nothing has to be read: the model's own plate is checked when it runs.
            rows = internals.plate_outside(name, size, self.around)["value"]
            if rows is not None:
                rows = as_rows(name, size, rows)
                self.plates[name] = PlateRows(name, size, len(rows), rows, "handler")
        if name not in self.plates:
            self.read()
        if name in self.plates:
            return self.plates[name]
        if self._failure is None or size is None:
            raise ValueError(
                f"The guide has a plate '{name}' that the model no longer has; the "
                f"model's plates are {sorted(self.plates)}. Build a new guide for "
                "the changed model, or name the model that it follows: "
                "dynamic_subsample(guide, model=model)."
            )
        return PlateRows(name, size, None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self._rewrite(msg)
        elif msg["type"] == "sample" and not msg["is_observed"]:
            for frame in msg["cond_indep_stack"]:
                if not msg["infer"].get("is_auxiliary"):
                    self.latents.setdefault(frame.name, []).append(msg["name"])
        # So the records reach the model that is replayed against this guide.
        msg["plates"] = self.plates

    def _rewrite(self, msg: dict[str, Any]) -> None:
        name = msg["inside"] = msg["name"]
        size, argument = msg["args"]
        own = size if argument is None else argument
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
        outside = internals.plate_outside(plate.name, plate.size, self.around)["name"]
        trace = internals.trace_around(self.around)
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

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate":
            return
        plate = self.plates[msg["inside"]]
        size, rows = plate.size, msg["value"]
        if not isinstance(rows, jax.Array) and not self.in_context:
            raise ValueError(
                f"The rows pinned for plate '{plate.name}' (size {size}) are of type "
                f"{type(rows).__name__}, and NumPyro's plates take JAX arrays only. "
                "Pin jnp.asarray(rows)."
            )
        if plate.rows is not None and plate.pinned_by == "handler":
            # A scope outside may have hidden the plate from the handler.
            rows = plate.rows
        elif not internals.is_default(rows, size):
            rows = as_rows(plate.name, size, rows)
        msg["value"] = rows
        # If a handler outside pins another number of rows than the model asks for,
        # NumPyro warns of it once, at the model's own plate.
        msg["args"] = (size, rows.shape[0])
        self.plates[msg["inside"]] = replace(plate, name=msg["name"], rows=rows)
        self._made.add(msg["inside"])


# ------------------------------------------------------------------ of a model


class hold_to_guide(Handler):
    """Holds the plates of a model to the rows that the guide took, or says why not."""

    # What `SubsampleSVI` knows of a batch: the plates that it names or pads.
    named: frozenset[str] = frozenset()
    padded: frozenset[str] = frozenset()

    def process_message(self, msg: dict[str, Any]) -> None:
        # Of nested contexts one acts. A guide's messages have its records.
        if internals.find_outermost(hold_to_guide) is not self or "plates" in msg:
            return
        if msg["type"] == "sample" and msg["is_observed"]:
            check_data(msg)
        replayed = internals.replayed() if msg["type"] == "plate" else None
        if replayed is None:
            return
        plate = internals.noted_plates(replayed.trace).get(msg["name"])
        if plate is not None and plate.rows is not None:
            check_same_rows(msg, plate, pinned_in_model(msg))
            # `replay` does so too, but for the trace of `TraceEnum_ELBO`, which has
            # no plates.
            msg["value"] = plate.rows

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            name, size = msg["name"], msg["args"][0]
            if not internals.is_default(msg["value"], size):
                msg["value"] = as_rows(name, size, msg["value"])


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


class predicting(Handler):
    """Stands around a call of ``Predictive``, which leaves no name of its own.

    Parameters
    ----------
    of_all_rows : bool
        Whether its samples are of all rows, or of the batch.
    samples : collection of str, optional
        The sites that it has samples of, if they are known.
    """

    def __init__(
        self, of_all_rows: bool, samples: Collection[str] | None = None
    ) -> None:
        super().__init__()
        self.of_all_rows = of_all_rows
        self._samples = samples

    def gives(self, site: str) -> bool:
        """Tell whether the value of a site is a sample."""
        return self._samples is None or site in self._samples
