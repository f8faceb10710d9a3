"""Read a model: run it hidden, and note the rows of its plates."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.initialization import init_to_uniform

from . import internals
from .internals import Handler
from .rows import PlateRows, RowsError, as_rows, check_subsample_size


class stand_in(Handler):
    """Stands in for all that is around a hidden run, of which it lets nothing out.

    Parameters
    ----------
    around : list of Messenger
        The handlers whose pins are passed on, the inner ones first.
    params : bool
        Whether parameters that they give are passed on, too.

    Attributes
    ----------
    pinned : set of str
        The plates whose rows the handlers around pin.
    gathers : set of str
        The plates, by their names inside the model, in which parameters with
        ``event_dim`` or ``numpyro.subsample`` stand.
    """

    def __init__(self, around: list[Any], params: bool) -> None:
        super().__init__()
        self._around = around
        self._givers = internals.gives_params() if params else []
        self.pinned: set[str] = set()
        self.gathers: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            name, size = msg["name"], msg["args"][0]
            rows = internals.plate_outside(name, size, self._around)["value"]
            if rows is not None:
                self.pinned.add(name)
                msg["value"] = as_rows(name, size, rows)
        elif msg["type"] in ("param", "mutable"):
            # Parameters with rows may be those of the batch only.
            if msg["kwargs"].get("event_dim") is None:
                for giver in self._givers:
                    giver.process_message(msg)
            # The model may write into a container, which is the user's.
            msg["value"] = jax.tree.map(jax.lax.stop_gradient, msg["value"])
        elif msg["type"] == "sample" and msg["value"] is None:
            msg["value"] = _any_value(msg)
        elif msg["type"] == "sample" and msg["is_observed"]:
            check_data(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("param", "subsample"):
            return
        event_dim = msg["kwargs"].get("event_dim")
        if event_dim is None:
            return
        shape = jnp.shape(msg["value"])
        for plate in internals.plates_around(self):
            axis = len(shape) + (plate.dim or 0) - event_dim
            if 0 <= axis < len(shape) and shape[axis] != 1:
                self.gathers.add(plate.name)


def _any_value(msg: dict[str, Any]) -> Any:
    """Spare a hidden run the prior's sampler, which can be slow or missing."""
    try:
        return init_to_uniform(msg)
    except (NotImplementedError, ValueError):
        # No bijection to the support, as of discrete or spherical sites: sample.
        return None


@contextmanager
def hidden_run(
    around: list[Any] | None = None, *, params: bool = False
) -> Generator[stand_in]:
    """Let a model run in here unseen: no trace of it, none of the callers' keys spent.

    Its latents have made-up values, which nothing validates or debugs. Effects of
    the model's own, such as ``jax.debug.callback``, happen once more.

    Parameters
    ----------
    around : list of Messenger, optional
        The handlers whose pins reach it all the same, the inner ones first; by default
        all that are entered now.
    params : bool
        Whether parameters reach it too.
    """
    around = internals.handlers_around() if around is None else around
    with (
        internals.without_debugging(),
        handlers.block(),
        stand_in(around, params) as outside,
        handlers.seed(rng_seed=0),
    ):
        yield outside


class _give_first_rows(Handler):
    """Gives a plate its first rows, unless others are pinned; entered innermost.

    A true draw would shuffle the whole plate.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate":
            return
        self.message = msg
        if msg["value"] is None:
            msg["value"] = jnp.arange(msg["args"][1])
        self.rows = msg["value"]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate":
            return
        size = msg["args"][0]
        if msg["value"] is not self.rows:
            msg["value"] = as_rows(msg["name"], size, msg["value"])
        # Of a pin of another length NumPyro warns when the model itself runs.
        msg["args"] = (size, msg["value"].shape[0])


def read_plates(
    model: Callable, args: tuple, kwargs: dict[str, Any], around: list[Any]
) -> dict[str, PlateRows]:
    """Learn the rows of a model's plates by running it, hidden from everything around.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    args, kwargs : tuple, dict
        What the model is called with.
    around : list of Messenger
        The handlers around guide and model, whose pins count; the inner ones first.

    Returns
    -------
    dict of str to PlateRows
        By name.

    Raises
    ------
    ValueError
        If a plate is asked for fewer rows than one or for more than it has; if pinned
        rows are not indices into their plate; if plates of one name differ in size; if
        data do not fit the plate that they stand in.
    """
    plates: dict[str, PlateRows] = {}
    final_names: dict[str, str] = {}  # handlers in the model may change them

    def noted(
        subsample: Callable, name: str, size: int, argument: Any, dim: int | None
    ) -> tuple[int, jax.Array]:
        check_subsample_size(name, size, size if argument is None else argument)
        with _give_first_rows() as giving:
            dim, rows = subsample(name, size, argument, dim)
        name = final_names[name] = giving.message["name"]
        pinned = giving.message["value"] is not giving.rows
        by_handler = name in outside.pinned
        # Rows that nobody pinned are in order here. The plate draws them later.
        forced = not pinned and rows.shape[0] == size
        plate = PlateRows(
            name=name,
            size=size,
            argument=size if forced and argument else argument,
            rows=rows if pinned else None,
            pinned_by=("handler" if by_handler else "model") if pinned else None,
        )
        known = plates.setdefault(name, plate)
        if (known.size, known.subsample_size) != (size, plate.subsample_size):
            raise RowsError(
                f"The model makes plate '{name}' twice: once it takes "
                f"{known.subsample_size} of {known.size} rows, and once "
                f"{plate.subsample_size} of {size}. Give the plates two names."
            )
        plates[name] = plate
        return dim, rows

    # Without their parameters, networks would be initialised at every reading.
    with hidden_run(around, params=True) as outside, internals.plates_made_by(noted):
        try:
            model(*args, **kwargs)
        except (TypeError, ValueError) as error:
            _refuse_short_batch(error, plates, (args, kwargs))
            raise
    for made_as in outside.gathers & final_names.keys():
        name = final_names[made_as]
        plates[name] = replace(plates[name], gathers=True)
    return plates


def _refuse_short_batch(
    error: Exception, plates: dict[str, PlateRows], arguments: Any
) -> None:
    """Say what is wrong where shapes do not fit since a plate takes all of its rows."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(arguments)}
    for plate in plates.values():
        for (count,) in lengths - {()}:
            # JAX names the two sizes that do not fit.
            if plate.in_order and {str(count), str(plate.size)} <= set(
                re.findall(r"\d+", str(error))
            ):
                raise _short(plate.name, plate.size, count) from error


def _short(name: str, size: int, count: int) -> RowsError:
    return RowsError(
        f"Plate '{name}' takes all of its {size} rows, but the batch brings {count}. "
        "Tell the plate how many: "
        f"numpyro.plate('{name}', {size}, subsample_size=len(batch))."
    )


def check_data(msg: dict[str, Any], subsampled: Collection[str] | None = None) -> None:
    """Refuse observed data that do not fit the plates they stand in.

    Parameters
    ----------
    msg : dict
        The message of an observed site.
    subsampled : collection of str, optional
        Plates that the model subsamples, in which one row of data is not for all rows.
    """
    shape = jnp.shape(msg["value"])
    shape = shape[: len(shape) - msg["fn"].event_dim]
    sizes = {(p.dim, p.subsample_size): p.size for p in internals.plates_around()}
    for name, dim, rows in msg["cond_indep_stack"]:
        size = sizes.get((dim, rows), rows)
        count = shape[dim] if len(shape) >= -dim else 1
        for_all = count == 1 and name not in (subsampled or ())
        if count == rows or size == 1 or for_all:
            continue
        if subsampled is None and count < rows == size:
            raise _short(name, size, count)
        raise RowsError(
            f"Site '{msg['name']}' has data for {count} rows, but stands in plate "
            f"'{name}', which takes {rows} of its {size} rows. Give it the data of "
            f"these rows: with numpyro.plate('{name}', ...) as rows: obs=data[rows]."
        )


# ------------------------------------------------------------------ all rows


class _take_all_rows(Handler):
    """Has the last word on the rows of one plate: all of them, in order."""

    def process_message(self, msg: dict[str, Any]) -> None:
        self._rows = internals.note_default(msg["value"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        msg["value"] = self._rows
        msg["args"] = (msg["args"][0], None)


class _check_whole_data(Handler):
    """Refuses observed sites whose data do not cover the plates they are in."""

    def __init__(self, subsampled: set[str]) -> None:
        super().__init__()
        self._subsampled = subsampled

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            check_data(msg, self._subsampled)


@contextmanager
def full_size() -> Generator[None]:
    """Make every plate in here take all its rows, in order.

    Raises
    ------
    ValueError
        Where observed data do not cover their plates. (Sites behind a ``block`` are
        not seen.)
    """

    def all_rows(
        subsample: Callable, name: str, size: int, argument: int | None, dim: int | None
    ) -> tuple[int, jax.Array]:
        if argument is not None and argument != size:
            subsampled.add(name)
        with _take_all_rows():
            return subsample(name, size, None, dim)

    subsampled: set[str] = set()
    with internals.plates_made_by(all_rows), _check_whole_data(subsampled):
        yield
