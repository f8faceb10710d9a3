"""All that is changed in NumPyro's classes while a guide is served, then undone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from typing import Any

import jax
from numpyro.infer.autoguide import AutoGuide

from . import internals
from .calls import predicting
from .given import GIVERS, taking_rows
from .guides import call_guide
from .internals import Handler, Tracer
from .posterior import POSTERIOR_METHODS, call_posterior_method
from .rows import check_subsample_size, take_pinned_rows
from .warn import check_predictive

_is_changed = False


@contextmanager
def numpyro_changed() -> Generator[None]:
    """Change NumPyro's classes for as long as this is entered, once for all inside.

    ================================  ==============================================
    of                                what is changed
    ================================  ==============================================
    autoguides                        a call follows the model's plates
    NumPyro's own autoguides          posterior methods take the rows that are pinned
    substitute, condition, do         give the rows of the batch, of values of all
    plate                             its rows are known as default, or not
    plate, and that of funsor         take rows from parameters in any order
    Predictive                        a call is known as such
    ================================  ==============================================
    """
    global _is_changed
    if _is_changed:
        yield
        return
    with ExitStack() as changes:

        def route(guide_class: type) -> None:
            changes.enter_context(
                internals.replaced(guide_class, **_routes(guide_class))
            )

        changes.enter_context(internals.all_replaced(_changes().items()))
        # Classes that are made in here.
        made = {"__init_subclass__": classmethod(route)}
        changes.enter_context(internals.replaced(AutoGuide, **made))
        changes.enter_context(internals.plates_made_by(_noting_default))
        _is_changed = True
        try:
            yield
        finally:
            _is_changed = False


def _changes() -> dict[type, dict[str, Any]]:
    changes = {cls: _routes(cls) for cls in _with_subclasses(AutoGuide)}
    for cls in GIVERS:
        changes[cls] = {"process_message": taking_rows(cls.process_message)}
    for cls in internals.PLATE_CLASSES:
        changes[cls] = {"postprocess_message": _taking_rows(cls.postprocess_message)}
    predict = internals.Predictive.__call__
    changes[internals.Predictive] = {"__call__": _known_as_such(predict)}
    return changes


def _with_subclasses(guide_class: type) -> list[type]:
    found = [guide_class]
    for cls in found:
        found += cls.__subclasses__()
    return found


def _routes(guide_class: type) -> dict[str, Callable]:
    """Return the methods of a class of guides, served.

    A call is looked up on the guide's class, so this is where it can be met with its
    arguments, in whatever loop it happens. Posterior methods that a user overrides are
    left alone; what they call of NumPyro's is met there.
    """
    own = vars(guide_class)
    routes = {"__call__": _served_call(own["__call__"])} if "__call__" in own else {}
    if guide_class.__module__.partition(".")[0] == "numpyro":
        for name in own.keys() & set(POSTERIOR_METHODS):
            routes[name] = _served_method(own[name])
    return routes


@cache
def _served_call(run: Any) -> Callable:
    @wraps(run)
    def method(guide: AutoGuide, *args: Any, **kwargs: Any) -> Any:
        return call_guide(guide, guide.model, args, kwargs, partial(run, guide))

    return method


@cache
def _served_method(run: Any) -> Callable:
    @wraps(run)
    def method(guide: AutoGuide, *args: Any, **kwargs: Any) -> Any:
        run_method = partial(run, guide)
        return call_posterior_method(guide, run.__name__, run_method, *args, **kwargs)

    return method


def _taking_rows(postprocess: Callable) -> Callable:
    # NumPyro's plate is asked last, after every trace has noted the value, so that
    # parameters are noted with all their rows.
    @wraps(postprocess)
    def postprocess_message(plate: Any, msg: dict[str, Any]) -> None:
        postprocess(plate, msg)
        take_pinned_rows(plate, msg)

    return postprocess_message


def _known_as_such(run: Any) -> Callable:
    @wraps(run)
    def predict(predictive: Any, rng_key: Any, *args: Any, **kwargs: Any) -> Any:
        # A posterior method says itself of which rows its samples are.
        known = internals.find(predicting)
        of_all_rows = predictive.guide is None if known is None else known.of_all_rows
        if of_all_rows:
            check_predictive(predictive, args, kwargs)
        with predicting(of_all_rows, predictive.posterior_samples):
            return run(predictive, rng_key, *args, **kwargs)

    return predict


class _note_default_rows(Handler):
    """Notes the rows that a plate has before any handler pins others."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["value"] is not None:
            internals.note_default(msg["value"])


def _noting_default(
    subsample: Callable, name: str, size: int, argument: Any, dim: int | None
) -> tuple[int, jax.Array]:
    if isinstance(argument, Tracer):
        check_subsample_size(name, size, argument)
    with _note_default_rows():
        return subsample(name, size, argument, dim)
