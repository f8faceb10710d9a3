"""Know what each family of guides needs while it is called."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from numpyro.infer.autoguide import AutoGuide

from .guide_call import GuideCall


def model_of(guide: Any) -> Callable | None:
    """Return the model that a guide was built for, looking through handlers."""
    while guide is not None:
        model = getattr(guide, "model", None)
        if callable(model):
            return model
        guide = getattr(guide, "fn", None) or getattr(guide, "func", None)
    return None


def call_autoguide(
    guide: AutoGuide, run: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Run an autoguide so that its plates follow the model's.

    Parameters
    ----------
    guide : AutoGuide
        The guide. Parts of a guide that is being called already follow its model.
    run : callable
        The class's own ``__call__``.
    args, kwargs : tuple, dict
        What the guide is called with.

    Returns
    -------
    Any
        What the guide returns.
    """
    call = GuideCall.current()
    if call is None:
        with GuideCall(guide.model, args, kwargs):
            return call_autoguide(guide, run, args, kwargs)
    with call.serving(guide) as already_served:
        if already_served:
            return run(guide, *args, **kwargs)
        if guide.prototype_trace is None:
            call.read_all()
        else:
            call.expect(guide._prototype_frames)
        with _create_plates_checked(guide, call):
            return run(guide, *args, **kwargs)


@contextmanager
def _create_plates_checked(guide: AutoGuide, call: GuideCall) -> Generator[None]:
    """Hold plates that the user makes to the model, instead of rewriting them."""
    create_plates = guide.create_plates
    if create_plates is None:
        yield
        return

    def checked(*args: Any, **kwargs: Any) -> Any:
        with call.made_by_user():
            return create_plates(*args, **kwargs)

    guide.create_plates = checked
    try:
        yield
    finally:
        guide.create_plates = create_plates
