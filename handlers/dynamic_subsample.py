"""The handler's three forms: around a guide, around a block of code, as a decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from numpyro.handlers import replay
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import _PYRO_STACK

from .guide_call import GuideCall, check_same_rows, rows_of_replayed_guide
from .guides import call_autoguide, model_of
from .posterior import QUESTIONS, LatentsOfAllRows, ask_autoguide


class dynamic_subsample(LatentsOfAllRows):
    """Let a guide's plates follow the model's, whatever their size was at first.

    NumPyro's automatic guides record their plates on the first call and keep that
    subsample size. While this handler is active, it learns the model's plates before
    a guide runs, by running the model with the same arguments up to the last plate
    that the guide needs, and gives the guide's plates that subsample size, and the
    same indices where they are pinned. Local latents keep parameters for all rows
    of their plate; those in the batch are used.

    Parameters
    ----------
    guide : callable, optional
        The guide to serve: an autoguide, or any callable if `model` is given. The
        result is used in its place and has its attributes, methods and class. Without
        a guide, the handler is a context manager that serves every autoguide called
        inside it.
    model : callable, optional
        The model whose plates the guide follows; by default the autoguide's own.

    Raises
    ------
    ValueError
        When made, if `guide` has no model and none is given. When the guide is called,
        if a plate of the guide is missing in the model or has another full size or
        dim there, if a subsample is smaller than 1 or larger than its plate, if
        pinned rows are not indices into the plate, or if a user's ``create_plates``
        disagrees with the model. As a context, if the model that runs against a guide
        asks a plate for another number of rows than the guide took, or pins others.

    Warns
    -----
    MisalignedSubsampleWarning
        Once per guide and plate, if local latents follow rows that the plate draws,
        and the data do not.

    Notes
    -----
    All plates of one name share one draw of rows within a call, across the parts of
    an ``AutoGuideList`` too. A guide that is compiled takes the sizes that it is
    traced with: enter the context around what is traced, ``jax.jit(svi.update)``
    called inside it for the first time, or wrap the guide.

    Examples
    --------
    >>> guide = dynamic_subsample(AutoNormal(model))
    >>> svi = SVI(model, guide, optim, Trace_ELBO())

    >>> with dynamic_subsample():
    ...     svi_state, loss = svi.update(svi_state, batch)

    >>> @dynamic_subsample(model=model)
    ... def guide(batch): ...
    """

    fn: Any

    def __init__(
        self, guide: Callable | None = None, *, model: Callable | None = None
    ) -> None:
        if type(guide) is dynamic_subsample:
            guide, model = guide.fn, model or guide._model
        if guide is not None and model is None and model_of(guide) is None:
            raise ValueError(
                f"dynamic_subsample does not know the model of the guide {guide!r}. "
                "Name it: dynamic_subsample(guide, model=model)."
            )
        super().__init__(guide)
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fn is None:
            (guide,) = args
            return dynamic_subsample(guide, model=self._model, **kwargs)
        with self:
            if GuideCall.current() is not None:
                return self.fn(*args, **kwargs)
            model = self._model or model_of(self.fn)
            assert model is not None
            context = any(
                type(h) is dynamic_subsample and h.fn is None for h in _PYRO_STACK
            )
            with GuideCall(model, args, kwargs, self.fn, context=context):
                return self.fn(*args, **kwargs)

    def __enter__(self) -> dynamic_subsample:
        super().__enter__()
        _AutoguideCalls.enter()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        _AutoguideCalls.exit()
        super().__exit__(exc_type, exc_value, traceback)

    def process_message(self, msg: dict[str, Any]) -> None:
        if GuideCall.current() is not None:
            return
        rows = rows_of_replayed_guide()
        if msg["type"] == "plate":
            # ``replay`` does so too, but for the trace of ``TraceEnum_ELBO``, which
            # has no plates.
            if msg["name"] in rows:
                check_same_rows(msg, rows[msg["name"]])
                msg["value"] = rows[msg["name"]].rows
        elif not rows:
            # A guide that the model runs against has taken its rows by itself.
            super().process_message(msg)

    # From here on: to look like the guide. NumPyro tests a guide's class with
    # isinstance and by name, and copies guides.

    @property
    def __class__(self) -> type:
        fn = vars(self).get("fn")
        return type(fn) if isinstance(fn, AutoGuide) else dynamic_subsample

    def __getattr__(self, name: str) -> Any:
        guide = vars(self).get("fn")
        if guide is None:
            raise AttributeError(f"dynamic_subsample has no attribute '{name}'")
        if name in QUESTIONS and isinstance(guide, AutoGuide):
            return functools.partial(self._ask, name)
        return getattr(guide, name)

    def _ask(self, question: str, *args: Any, **kwargs: Any) -> Any:
        with self:
            return getattr(self.fn, question)(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        guide = vars(self).get("fn")
        if isinstance(guide, AutoGuide) and name in vars(guide):
            setattr(guide, name, value)
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.fn)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fn)

    def __getitem__(self, key: Any) -> Any:
        return self.fn[key]

    def __bool__(self) -> bool:
        return self.fn is None or bool(self.fn)

    def __repr__(self) -> str:
        inside = [] if self.fn is None else [repr(self.fn)]
        inside += [] if self._model is None else [f"model={self._model!r}"]
        return f"dynamic_subsample({', '.join(inside)})"

    def __reduce__(self) -> tuple:
        return _rebuild, (self.fn, self._model)


def _rebuild(guide: Callable | None, model: Callable | None) -> dynamic_subsample:
    return dynamic_subsample(guide, model=model)


class _AutoguideCalls:
    """Routes all autoguides' calls and posterior methods through this library.

    A call is looked up on the guide's class, so this is where it can be met with its
    arguments, in whatever loop it happens. Entering again inside does nothing.
    """

    _depth = 0
    _replay: ClassVar[Callable]
    _as_they_were: ClassVar[dict[tuple[type, str], Callable]] = {}

    @classmethod
    def enter(cls) -> None:
        cls._depth += 1
        if cls._depth == 1:
            AutoGuide.__init_subclass__ = classmethod(cls._route)  # ty: ignore[invalid-assignment]
            for guide_class in _subclasses(AutoGuide):
                cls._route(guide_class)
            cls._replay = replay.process_message
            replay.process_message = _noting_pins(cls._replay)  # ty: ignore[invalid-assignment]

    @classmethod
    def exit(cls) -> None:
        cls._depth -= 1
        if cls._depth == 0:
            del AutoGuide.__init_subclass__
            replay.process_message = cls._replay  # ty: ignore[invalid-assignment]
            while cls._as_they_were:
                (guide_class, name), run = cls._as_they_were.popitem()
                setattr(guide_class, name, run)

    @classmethod
    def _route(cls, guide_class: type) -> None:
        for name in ("__call__", *QUESTIONS):
            run = vars(guide_class).get(name)
            if run is not None and (guide_class, name) not in cls._as_they_were:
                cls._as_they_were[guide_class, name] = run
                setattr(guide_class, name, _routed(name, run))


def _routed(name: str, run: Callable) -> Callable:
    @functools.wraps(run)
    def method(guide: AutoGuide, *args: Any, **kwargs: Any) -> Any:
        if name == "__call__" and GuideCall.current() is None:
            with GuideCall(guide.model, args, kwargs, guide):
                return call_autoguide(guide, run, args, kwargs)
        if name == "__call__":
            return call_autoguide(guide, run, args, kwargs)
        return ask_autoguide(guide, name, run, args, kwargs)

    return method


def _noting_pins(process: Callable) -> Callable:
    """Keep what a model pins inside, before ``replay`` puts the guide's rows there."""

    @functools.wraps(process)
    def process_message(handler: replay, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            msg.setdefault("pinned_inside", msg["value"])
        process(handler, msg)

    return process_message


def _subclasses(guide_class: type) -> Iterator[type]:
    for subclass in guide_class.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
