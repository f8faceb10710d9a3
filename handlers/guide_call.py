"""Rewrite the plates of a guide, during one call of it, to those of the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.core import Tracer
from numpyro.handlers import replay, trace
from numpyro.primitives import _PYRO_STACK, CondIndepStackFrame, Messenger

from .alignment import Drawn, check_drawn_rows, drawn_apart, keeps_rows_in_order
from .plates import (
    ModelPlate,
    at_full_size,
    check_subsample_size,
    read_plates,
    take_rows,
)


class GuideRows(NamedTuple):
    """The rows that a plate took in a guide.

    Attributes
    ----------
    rows : jax.Array
        The indices, shape ``(subsample_size,)``.
    drawn : bool
        Whether the plate drew them.
    around : bool
        Whether a handler around the call of the guide pinned them.
    """

    rows: jax.Array
    drawn: bool
    around: bool


class GuideCall(Messenger):
    """What is known and decided about plates while a guide runs once.

    Parameters
    ----------
    model : callable
        The model whose plates the guide is to follow.
    args, kwargs : tuple, dict
        What model and guide are called with.
    guide : callable, optional
        The guide, if its latents are to be checked against the model's data.
    context : bool
        Whether the model is going to be given the rows of this call.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        guide: Callable | None = None,
        *,
        context: bool = True,
    ) -> None:
        super().__init__()
        self._run = (model, args, kwargs)
        self._guide = guide
        self._context = context
        self._plates: dict[str, ModelPlate] = {}
        self._expected: set[str] = set()
        self._by_user = False
        # Per plate, for the whole call: what it took, and how to tell whether that was
        # drawn by the plate, all rows in order (as preset), or pinned by somebody.
        self._taken: dict[str, GuideRows] = {}
        self._preset: dict[str, Any] = {}
        # Known to be indices of the plate, and those that it has drawn.
        self._drawn: set[str] = set()
        self._drawn_by_plate: set[str] = set()
        self._shuffled: set[str] = set()
        self._given: dict[str, Any] = {}
        self._latents: dict[str, list[str]] = {}
        self._serving: list[Any] = []

    def __enter__(self) -> GuideCall:
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        try:
            if exc_type is None and self._guide is not None:
                self._check_drawn_rows(self._guide)
        finally:
            super().__exit__(exc_type, exc_value, traceback)

    def _check_drawn_rows(self, guide: Callable) -> None:
        with self.outside():
            for name, latents in self._latents.items():
                taken = self._taken.get(name)
                size = self._plates[name].size
                if taken is None or not taken.drawn or len(taken.rows) == size:
                    continue
                plate = Drawn(name, size, taken.rows, latents)
                apart = drawn_apart(self._context)
                check_drawn_rows(guide, *self._run, plate, self._again, apart)

    def _again(self) -> GuideCall:
        again = GuideCall(*self._run)
        again._plates = self._plates
        return again

    @staticmethod
    def current() -> GuideCall | None:
        """Return the call of a guide that is under way, if there is one."""
        for handler in reversed(_PYRO_STACK):
            if isinstance(handler, GuideCall):
                return handler
        return None

    @contextmanager
    def serving(self, guide: Any) -> Generator[bool]:
        """Enter a guide; gives whether it was entered before, by its subclass."""
        again = any(guide is other for other in self._serving)
        self._serving.append(guide)
        try:
            yield again
        finally:
            self._serving.pop()

    def takes_some(self, name: str) -> bool:
        """Tell whether a plate of the guide takes other rows than all, in order."""
        taken = self._taken[name].rows.shape[0]
        return taken != self.model_plate(name).size or name in self._shuffled

    def expect(self, names: Iterable[str]) -> None:
        """Name plates that the guide is going to need: one reading then serves all."""
        self._expected.update(names)

    def read_all(self) -> None:
        """Read every plate of the model now."""
        with self.outside():
            self._plates |= read_plates(*self._run)

    def plates(self) -> list[ModelPlate]:
        """Return the model's plates that have been read."""
        return list(self._plates.values())

    @contextmanager
    def made_by_user(self) -> Generator[None]:
        """Check plates that are made in here against the model, and rewrite none."""
        before, self._by_user = self._by_user, True
        try:
            yield
        finally:
            self._by_user = before

    def model_plate(self, name: str) -> ModelPlate:
        """Return the model's plate of this name."""
        if name not in self._plates:
            with self.outside():
                self._plates |= read_plates(*self._run, until=self._expected | {name})
        if name not in self._plates:
            raise ValueError(
                f"The guide has a plate '{name}' that the model no longer has; the "
                f"model's plates are {sorted(self._plates)}. Build a new guide for "
                "the changed model, or name the model that it follows: "
                "dynamic_subsample(guide, model=model)."
            )
        return self._plates[name]

    @contextmanager
    def outside(self) -> Generator[None]:
        """Step out of the guide: hide the handlers that were entered inside it."""
        here = _PYRO_STACK.index(self)
        inside = _PYRO_STACK[here:]
        del _PYRO_STACK[here:]
        try:
            yield
        finally:
            _PYRO_STACK.extend(inside)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self._follow_model(msg)
        elif msg["type"] == "sample":
            for frame in msg["cond_indep_stack"]:
                self._check_dim(frame)
                if not msg["is_observed"] and not msg["infer"].get("is_auxiliary"):
                    self._latents.setdefault(frame.name, []).append(msg["name"])
            msg["plate_rows"] = self._taken

    def _follow_model(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        size, subsample_size = msg["args"]
        frozen = size if subsample_size is None else subsample_size
        plate = self.model_plate(name)
        if plate.size != size:
            raise ValueError(
                f"Plate '{name}' has size {plate.size} in the model, but the guide's "
                f"parameters were made for {size} rows. Keep the plate's size that of "
                "the whole data set, or build a new guide and call svi.init again."
            )
        if self._by_user and frozen != plate.requested:
            raise ValueError(
                f"create_plates gives plate '{name}' (size {size}) {frozen} rows, but "
                f"the model asks for {plate.requested}. Leave create_plates out: "
                "dynamic_subsample makes it unnecessary."
            )
        pinned_by_guide = frozen < size and msg["value"] is not None
        if name in self._taken:
            msg["value"] = self._taken[name].rows
        elif plate.rows is not None:
            msg["value"] = plate.rows
        elif frozen == plate.requested:
            self._preset[name] = None if pinned_by_guide else msg["value"]
        elif pinned_by_guide:
            raise ValueError(
                f"The guide pins {frozen} rows of plate '{name}' (size {size}), but "
                f"the model asks for {plate.requested}. Pin the rows once, "
                "around guide and model alike."
            )
        elif plate.requested == size:
            msg["value"] = self._preset[name] = jnp.arange(size)
        else:
            msg["value"] = None
        if msg["value"] is None:
            msg["value"] = self._rows_of_other_part(name, plate.requested)
        takes_all = plate.asked is None and plate.requested == size
        msg["args"] = (size, None if takes_all else plate.requested)
        self._given.setdefault(name, msg["value"])
        if msg["value"] is None:
            msg["fn"] = self._drawing(msg, msg["fn"])
        msg["drawn"] = name in self._drawn_by_plate

    def _rows_of_other_part(self, name: str, count: int) -> Any:
        """Return the rows that another guide of the same run took, if one did.

        So the parts of an ``AutoGuideList`` that are served one by one share theirs.
        """
        outside = _PYRO_STACK[: _PYRO_STACK.index(self)]
        for handler in reversed(outside):
            if isinstance(handler, trace):
                site = handler.trace.get(name)
                if site is not None and jnp.shape(site["value"]) == (count,):
                    self._drawn.add(name)
                    if site.get("drawn"):
                        self._drawn_by_plate.add(name)
                    return site["value"]
                break
        return None

    def _drawing(self, msg: dict[str, Any], draw: Callable) -> Callable:
        name = msg["name"]

        def drawn(size: int, subsample_size: int, rng_key: Any = None) -> jax.Array:
            self._drawn.add(name)
            self._drawn_by_plate.add(name)
            # Before any trace around the call copies the message.
            msg["drawn"] = True
            # A seed handler entered inside the guide saw a full plate that needs no
            # key; any other has given one by now.
            key = numpyro.prng_key() if rng_key is None else rng_key
            return draw(size, subsample_size, rng_key=key)

        return drawn

    def _check_dim(self, frame: CondIndepStackFrame) -> None:
        plate = self.model_plate(frame.name)
        if plate.dim != frame.dim:
            raise ValueError(
                f"Plate '{frame.name}' (size {plate.size}) is at dim {plate.dim} in "
                f"the model and at dim {frame.dim} in the guide. Give the plate one "
                "explicit dim in the model, or build a new guide for the changed model."
            )

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self._take_rows(msg)
        elif msg["type"] == "param" and self._shuffled:
            self._gather_shuffled(msg)

    def _take_rows(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        size = msg["args"][0]
        rows = msg["value"]
        if name not in self._taken:
            if name not in self._drawn and rows is not self._preset.get(name):
                check_rows(name, size, rows)
                if rows.shape[0] == size:
                    with self.outside():
                        in_order = keeps_rows_in_order(*self._run, name, rows)
                    if not in_order:
                        self._shuffled.add(name)
            settled = at_full_size()
            drawn = name in self._drawn_by_plate and not settled
            around = settled or not (drawn or rows is self._given[name])
            self._taken[name] = GuideRows(rows, drawn, around)
        # Where a handler around the call pins another number of rows than the model
        # asks for, it is the model's own plate that NumPyro warns of.
        msg["args"] = (size, rows.shape[0])

    def _gather_shuffled(self, msg: dict[str, Any]) -> None:
        """Take the rows that `numpyro.plate` leaves in place when all are pinned."""
        event_dim = msg["kwargs"].get("event_dim")
        if event_dim is None:
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name in self._shuffled:
                rows = self._taken[frame.name].rows
                msg["value"] = take_rows(
                    msg["value"], rows, frame.size, frame.dim - event_dim
                )


def rows_of_replayed_guide() -> dict[str, GuideRows]:
    """Return the rows, by plate, of the guide that a model is run against just now."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, replay):
            for site in handler.trace.values():
                if "plate_rows" in site:
                    return site["plate_rows"]
    return {}


def check_same_rows(msg: dict[str, Any], guide: GuideRows) -> None:
    """Refuse a plate of the model that wants other rows than its guide took.

    Parameters
    ----------
    msg : dict
        The plate's message. Its "pinned_inside" is what a handler inside of the model
        pins, or all rows, or None.
    guide : GuideRows
        What the plate took in the guide.
    """
    if guide.around:
        # So are the model's.
        return
    name, (size, asked) = msg["name"], msg["args"]
    asked = size if asked is None else asked
    rows = guide.rows
    remedy = (
        "Name the model that the guide is to follow, dynamic_subsample(guide, "
        "model=model), or pin the rows once, around guide and model alike."
    )
    if asked != rows.shape[0]:
        raise ValueError(
            f"The model asks plate '{name}' (size {size}) for {asked} rows, but the "
            f"guide that it runs against took {rows.shape[0]}. {remedy}"
        )
    pinned = msg.get("pinned_inside")
    if pinned is None or pinned is rows:
        return
    concrete = not isinstance(pinned, Tracer) and not isinstance(rows, Tracer)
    if concrete:
        differ = not np.array_equal(pinned, rows)
    else:
        differ = guide.drawn and asked < size
    if differ:
        raise ValueError(
            f"The model pins rows {_shortened(pinned)} of plate '{name}' (size "
            f"{size}), but the guide that it runs against took {_shortened(rows)}. "
            f"{remedy}"
        )


def _shortened(rows: Any) -> str:
    if isinstance(rows, Tracer):
        return "that are arguments of the compiled step"
    return np.array2string(np.asarray(rows), threshold=8, edgeitems=3)


def check_rows(name: str, size: int, rows: Any) -> None:
    """Refuse pinned rows that are no indices into a plate of `size` rows."""
    if jnp.ndim(rows) != 1 or not jnp.issubdtype(jnp.result_type(rows), jnp.integer):
        raise ValueError(
            f"The rows pinned for plate '{name}' (size {size}) must be a vector of "
            f"integers, but have shape {jnp.shape(rows)} and type "
            f"{jnp.result_type(rows)}."
        )
    check_subsample_size(name, size, jnp.shape(rows)[0])
    if isinstance(rows, Tracer):
        return
    # On NumPy's side, as a JAX array is traced even where it is concrete.
    rows = np.asarray(rows)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"The rows pinned for plate '{name}' (size {size}) run from {low} to "
            f"{high}, outside 0 to {size - 1}. JAX would clamp them to other rows; "
            "pin indices into the whole plate."
        )
