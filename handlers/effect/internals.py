"""All that this library needs of NumPyro's and JAX's insides, and of the handler stack.

No other file names what NumPyro or JAX keep private, and no other file looks at the
stack of handlers.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import jax
import numpyro

try:
    from jax.core import Tracer, eval_jaxpr
    from numpyro.contrib.funsor.discrete import _sample_posterior as sample_enumerated
    from numpyro.contrib.funsor.enum_messenger import enum
    from numpyro.contrib.funsor.enum_messenger import plate as enum_plate
    from numpyro.handlers import do, replay, scope, substitute, trace
    from numpyro.infer import Predictive
    from numpyro.infer.autoguide import AutoGuide
    from numpyro.ops.provenance import eval_provenance
    from numpyro.optim import _NumPyroOptim as Optimizer
    from numpyro.primitives import _PYRO_STACK as STACK
    from numpyro.primitives import CondIndepStackFrame, Messenger, plate

    # What is used of classes; of their instances, see `tests/test_internals.py`.
    plate._subsample, AutoGuide._setup_prototype, Predictive.__call__  # noqa: B018
except (AttributeError, ImportError) as error:
    raise ImportError(
        "numpyro_dynamic_subsample works with numpyro 0.21 and 0.22; of numpyro "
        f"{version('numpyro')} and jax {version('jax')} it misses: {error}."
    ) from error

__all__ = [
    "CondIndepStackFrame",
    "Messenger",
    "Optimizer",
    "Tracer",
    "eval_jaxpr",
    "eval_provenance",
    "sample_enumerated",
]


class Handler(Messenger):
    """A messenger that gives itself to ``with ... as``."""

    def __enter__(self) -> Any:
        super().__enter__()
        return self


# ------------------------------------------------------------------ plates


@contextmanager
def plates_made_by(make: Callable[..., tuple[int, jax.Array]]) -> Generator[None]:
    """Let `make` choose the rows of every new plate, given NumPyro's way of doing so.

    NumPyro makes the message of a plate in this one static method. Only here is a
    plate met before all handlers, those inside the model too, so that its default rows
    can be told from pinned rows.
    """
    with replaced(plate, _subsample=staticmethod(partial(make, plate._subsample))):
        yield


def rows_of(plate: Any) -> jax.Array:
    """Return the rows of a plate, NumPyro's or funsor's."""
    return plate._indices.data if isinstance(plate, enum_plate) else plate._indices


PLATE_CLASSES = (plate, enum_plate)


def plates_around(outside: Any = None) -> Iterator[Any]:
    """Yield the plates that are entered now, the inner ones first.

    Parameters
    ----------
    outside : Messenger, optional
        Leave out the plates that were entered before this handler.
    """
    for handler in handlers_inside(outside):
        if isinstance(handler, PLATE_CLASSES):
            yield handler


# Rows that a plate has by default, by identity: those in order, made by NumPyro. They
# cannot be told from pinned rows by value, since a compiled step has no values.
_default_rows: WeakValueDictionary[int, Any] = WeakValueDictionary()


def note_default(rows: jax.Array) -> jax.Array:
    """Remember that these rows are all of a plate, in order, and return them."""
    _default_rows[id(rows)] = rows
    return rows


def is_default(rows: Any, size: int) -> bool:
    """Tell whether these rows were noted as all rows of a plate of this size."""
    return _default_rows.get(id(rows)) is rows and rows.shape[0] == size


# ------------------------------------------------------------------ the handler stack

_Handler = TypeVar("_Handler")


def find(handler_type: type[_Handler]) -> _Handler | None:
    """Return the innermost handler of a type that is entered, if there is one."""
    return next((h for h in reversed(STACK) if isinstance(h, handler_type)), None)


def find_outermost(handler_type: type[_Handler]) -> _Handler | None:
    """Return the outermost handler of a type that is entered, if there is one."""
    return next((h for h in STACK if isinstance(h, handler_type)), None)


def handlers_inside(handler: Any = None) -> list[Any]:
    """Return the handlers entered after `handler`, the inner ones first."""
    return STACK[0 if handler is None else STACK.index(handler) + 1 :][::-1]


def handlers_around(handler: Any = None) -> list[Any]:
    """Return the handlers entered before `handler`, the inner ones first."""
    return STACK[: None if handler is None else STACK.index(handler)][::-1]


def plate_outside(name: str, size: int, handlers: Iterable[Any]) -> dict[str, Any]:
    """Return what some handlers make of the message of a plate.

    Parameters
    ----------
    name : str
        The plate's name, as the first of the handlers meets it.
    size : int
        Its size.
    handlers : iterable of Messenger
        The handlers, the inner ones first. Those count that rename plates or pin rows.

    Returns
    -------
    dict
        The message: its "name" outside of the handlers, and as "value" the rows that
        they pin, None where they do not.
    """
    msg: dict[str, Any] = {"type": "plate", "name": name, "args": (size, None)}
    msg |= {"fn": plate, "kwargs": {"rng_key": None}, "value": None, "scale": 1.0}
    msg |= {"cond_indep_stack": []}
    for handler in handlers:
        if isinstance(handler, substitute | replay | scope):
            handler.process_message(msg)
    return msg


def name_inside(name: str, handlers: Sequence[Any]) -> str:
    """Return a plate's name before these handlers, inner ones first, changed it."""
    for handler in reversed(handlers):
        if isinstance(handler, scope) and "plate" not in handler.hide_types:
            name = name.removeprefix(f"{handler.prefix}{handler.divider}")
    return name


def noted_plates(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the records, by name, that guides have left in the sites of a trace."""
    records = {}
    for site in trace.values():
        for record in site.get("plates", {}).values():
            records[record.name] = record
    return records


def trace_around(handlers: Iterable[Any]) -> Mapping[str, Any]:
    """Return what the first trace among some handlers has recorded so far."""
    return next((h.trace for h in handlers if isinstance(h, trace)), {})


def replayed() -> replay | None:
    """Return the handler that runs a model against the trace of a guide, if any."""
    return find(replay)


def gives_params() -> list[Any]:
    """Return the handlers that hand out parameters now, the inner ones first."""
    return [h for h in handlers_around() if isinstance(h, substitute | replay)]


def intervenes(handler: Any, msg: dict[str, Any]) -> bool:
    """Tell whether a handler is `do`, about to replace the value of a site."""
    if not isinstance(handler, do) or msg["name"] not in (handler.data or {}):
        return False
    return msg.get("_intervener_id") != handler._intervener_id


def enumerating() -> bool:
    """Tell whether funsor enumerates sites, as ``TraceEnum_ELBO`` does."""
    return find(enum) is not None


def under_renyi_elbo() -> bool:
    """Tell whether ``RenyiELBO`` runs.

    An objective leaves no name on the stack. This one alone seeds plates apart from
    sites, so that its particles share their rows.
    """
    return any("sample" in getattr(h, "hide_types", ()) for h in STACK)


# ------------------------------------------------------------------ automatic guides


def frames(guide: Any) -> dict[str, CondIndepStackFrame]:
    """Return the plates of a guide's latents, as the first call had them."""
    return guide._prototype_frames


def full_sizes(guide: Any) -> dict[str, int]:
    """Return the sizes of the plates that a guide knows, to be added to."""
    return guide._prototype_frame_full_sizes


def set_up_prototype(guide: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Let a guide learn the model's structure, as NumPyro does in its first call."""
    guide._setup_prototype(*args, **kwargs)


def with_posterior(guide: Any, posterior: Any) -> Any:
    """Let a joint guide draw from another distribution of all latents."""
    return replaced(guide, _get_posterior=lambda *args, **kwargs: posterior)


def initial_values(guide: Any) -> dict[str, Any]:
    """Return where the latents of a guide start, by site, to be changed."""
    return guide._init_locs


def sites_of_first_call(guide: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Run the model on the first call's arguments, with unconstrained latents."""
    return guide._postprocess_fn(values)


def with_postprocessing(guide: Any, run: Callable, prototype: Any) -> Any:
    """Let a guide make sites of its latents by `run`, instead of by its model."""
    return replaced(guide, _postprocess_fn=run, prototype_trace=prototype)


def local_plate(guide: Any) -> tuple[str, int, int]:
    """Return the plate of an ``AutoSemiDAIS``: name, size and subsample size."""
    return guide._local_plate


def with_local_plate(guide: Any, plate: tuple[str, int, int]) -> Any:
    """Let an ``AutoSemiDAIS`` have another subsample size."""
    return replaced(guide, _local_plate=plate)


def event_dims(guide: Any) -> dict[str, int]:
    """Return how many dims of a mean-field guide's parameters are no plate's."""
    return guide._event_dims


def forget_first_call(guide: Any) -> None:
    """Let the next call of a guide be its first one."""
    guide.prototype_trace = None
    guide._prototype_frame_full_sizes = {}


# ------------------------------------------------------------------ changes, undone


def replaced(owner: Any, **attributes: Any) -> AbstractContextManager[None]:
    """Give a class or an object other attributes, and its own ones back at the end."""
    return all_replaced([(owner, attributes)])


@contextmanager
def all_replaced(changes: Collection[tuple[Any, dict[str, Any]]]) -> Generator[None]:
    """Give some classes or objects other attributes, and their own back at the end."""
    missing = object()
    before = [
        (owner, name, vars(owner).get(name, missing))
        for owner, attributes in changes
        for name in attributes
    ]
    for owner, attributes in changes:
        for name, value in attributes.items():
            setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def undone_on_error(owner: Any) -> Generator[None]:
    """Take back what an error leaves half made, such as a guide's prototype."""
    before = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(owner).items()
    }
    try:
        yield
    except BaseException:
        vars(owner).clear()
        vars(owner).update(before)
        raise


@contextmanager
def without_debugging() -> Generator[None]:
    """Let nothing validate or debug the values that are computed in here."""
    debugs = {"jax_debug_nans": jax.debug_nans, "jax_debug_infs": jax.debug_infs}
    with ExitStack() as stack:
        stack.enter_context(numpyro.validation_enabled(False))
        for name, debug in debugs.items():
            # To turn off what is off would make JAX compile again.
            if getattr(jax.config, name):
                stack.enter_context(debug(False))
        yield
