"""Pin the rows of plates to what an argument of the model holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from inspect import Parameter, signature
from typing import Any

import jax
import numpy as np
from numpyro.handlers import substitute

from .internals import Tracer
from .rows import as_integers, check_rows


class pin_rows:
    """Let plates of a model take their rows from an argument of the model.

    Use it where a training loop cannot be told of rows. Wherever the model runs, in a
    guide's first call, in a compiled step, in ``numpyro.infer.Predictive`` or
    ``log_likelihood``, a named plate takes the rows that the argument holds in that
    call. Give the guide the same model: ``AutoNormal(model)``.

    Parameters
    ----------
    model : callable, optional
        The NumPyro model. Without it, the result is a decorator.
    **plates : str
        For each plate, the name of the argument that holds its rows: integers of shape
        ``(subsample_size,)``. Arguments may be given by name or by position, or by
        default. Where the argument is None, the plate draws its rows, or takes all.
        Give the names of plates that are no Python names as ``**{"my plate": "idx"}``.

    Raises
    ------
    TypeError
        When made, if the model is not callable or no plate is named.
    ValueError
        When made, if the model has no such argument. When called, if the model does
        not make a plate of that name; if the rows are not indices into the plate; if
        the plate takes others, known to differ, as those of a guide that is not served.

    Examples
    --------
    >>> @pin_rows(people="idx")
    ... def model(y, idx):
    ...     with numpyro.plate("people", 100, subsample_size=len(y)) as rows:
    ...         z = numpyro.sample("z", dist.Normal(0, 1))
    ...         numpyro.sample("y", dist.Normal(z, 1), obs=y)
    ...     return rows
    >>> handlers.seed(model, 0)(jnp.zeros(2), idx=jnp.array([7, 3])).tolist()
    [7, 3]
    """

    def __new__(cls, model: Callable | None = None, /, **plates: str) -> Any:
        if model is None and plates:
            return partial(cls, **plates)
        return super().__new__(cls)

    def __init__(self, model: Callable, /, **plates: str) -> None:
        if not callable(model) or not plates:
            raise TypeError(
                "pin_rows takes a model, and for each plate the name of the argument "
                f"that holds its rows: pin_rows(model, people='idx'), not {model!r} "
                f"and {plates}."
            )
        self._model, self._plates = model, plates
        self._signature = signature(model)
        parameters = self._signature.parameters
        open_ended = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
        for plate, name in plates.items():
            if name not in parameters and not open_ended:
                raise ValueError(
                    f"pin_rows takes the rows of plate '{plate}' from the argument "
                    f"{name!r}, but the arguments of the model are {list(parameters)}."
                )
        update_wrapper(self, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is Parameter.VAR_KEYWORD:
                given |= given.pop(name)
        rows = {plate: given.get(name) for plate, name in self._plates.items()}
        rows = {plate: own for plate, own in rows.items() if own is not None}
        with _pinned_rows(rows) as pins:
            result = self._model(*args, **kwargs)
        for plate in sorted(self._plates.keys() - pins.sizes.keys()):
            raise ValueError(
                f"pin_rows takes the rows of plate '{plate}' from the argument "
                f"{self._plates[plate]!r}, but the plates that the model makes are "
                f"{sorted(pins.sizes)}."
            )
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        # As a method is, of an object.
        return self if instance is None else partial(self, instance)

    def __repr__(self) -> str:
        return f"pin_rows({self._model!r}, {self._plates})"


class substitute_rows(substitute):
    """Substitutes rows of plates, and holds them to the plates' sizes.

    Parameters
    ----------
    rows : dict of str to array
        By plate.

    Attributes
    ----------
    sizes : dict of str to int
        The sizes of the plates that have been made in here.
    """

    data: dict[str, jax.Array]

    def __init__(self, rows: Mapping[str, Any]) -> None:
        # Made arrays here, once: a loss may compile parts of itself.
        super().__init__(data={name: as_integers(own) for name, own in rows.items()})
        self._known = {
            name: self.data[name] if isinstance(self.data[name], Tracer) else own
            for name, own in rows.items()
        }
        self.sizes: dict[str, int] = {}

    def __enter__(self) -> Any:
        super().__enter__()
        return self

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            name, size = msg["name"], msg["args"][0]
            self.sizes[name] = size
            if name in self.data:
                check_rows(name, size, self._known[name])
        super().process_message(msg)


class _pinned_rows(substitute_rows):
    """Pins rows of plates, and refuses that handlers around give others."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate" or msg["name"] not in self.data:
            return
        rows, taken = self.data[msg["name"]], msg["value"]
        if taken is rows or (isinstance(rows, Tracer) and isinstance(taken, Tracer)):
            return
        traced = isinstance(rows, Tracer) or isinstance(taken, Tracer)
        if traced or not np.array_equal(rows, taken):
            raise ValueError(
                f"pin_rows pins {len(rows)} rows of plate '{msg['name']}' (size "
                f"{msg['args'][0]}), but a handler around the model gives it other "
                "ones, as NumPyro does with those of a guide that is not served. Enter "
                "dynamic_subsample() around init and all steps, wrap the guide in it, "
                "or pin the same rows in the guide."
            )
