"""The handler's three forms: around a guide, around a block of code, as a decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jax
from jax.typing import ArrayLike
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoGuide, AutoGuideList
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from . import internals
from .alignment import check_predictive
from .guides import call_guide, model_of
from .model_call import ModelCall, Samples
from .plates import Rows
from .posterior import POSTERIOR_METHODS, call_posterior_method


class dynamic_subsample(ModelCall):
    """Let a guide's plates follow the model's, whatever their size was at first.

    NumPyro's automatic guides record their plates on the first call and keep that
    subsample size. While this handler is active, it learns the model's plates before
    a guide runs, by running the model with the same arguments up to the last plate
    that the guide needs, and gives the guide's plates that subsample size, and the
    same rows where they are pinned. Local latents keep parameters for all rows of
    their plate; those in the batch are used.

    Parameters
    ----------
    guide : callable, optional
        The guide to serve: an autoguide, or any callable if `model` is given. The
        result is used in its place and has its attributes, methods and class. Without
        a guide, the handler is a context manager that serves every autoguide called
        inside it.
    model : callable, optional
        The model whose plates the guide follows; by default the autoguide's own.
    rows, valid : dict of str to str or int, optional
        For each plate whose rows, or the count of those that are valid, arrive in an
        argument of the model, the name of that argument, or its position. So a loop
        that knows nothing of rows can train. Counts need the context, which reaches
        the model.

    Raises
    ------
    ValueError
        When made, if `guide` has no model and none is given. When the guide is called,
        if a plate of the guide is missing in the model or has another full size or
        dim there, if a subsample is smaller than 1 or larger than its plate, if
        pinned rows are not indices into the plate, or if a user's ``create_plates``
        disagrees with the model. If a wrapped guide is called outside of a context,
        also if all rows of a plate are pinned in another order and the model has
        parameters with ``event_dim`` or ``numpyro.subsample`` there, which NumPyro
        leaves in the plate's order. As a context, if the model that runs against a
        guide asks a plate for another number of rows than the guide took, or pins
        others.

    Warns
    -----
    MisalignedSubsampleWarning
        Once per guide and plate, if local latents follow rows that the plate draws,
        and the data do not.
    UnscaledSubsampleWarning
        Once per guide and site, if data outside of a subsampled plate depend on latents
        in it, and have no scale.

    Notes
    -----
    All plates of one name share one draw of rows within a call, across the parts of
    an ``AutoGuideList`` too. A guide that is compiled takes the sizes that it is
    traced with: enter the context around what is traced, ``jax.jit(svi.update)``
    called inside it for the first time, or wrap the guide.

    The run that learns the model's plates consumes no random key and leaves no
    computation in a compiled program, but effects of the model, such as
    ``jax.debug.callback``, happen once more. In a context nothing is run where a
    handler around pins the rows of all plates that the guide needs.

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
        self,
        guide: Callable | None = None,
        *,
        model: Callable | None = None,
        rows: Mapping[str, str | int] | None = None,
        valid: Mapping[str, str | int] | None = None,
    ) -> None:
        if type(guide) is dynamic_subsample:
            valid = valid or guide._valid
            guide, model, rows = guide.fn, model or guide._model, rows or guide._rows
        if guide is not None:
            _check_guide(guide, model)
        super().__init__(guide)
        self._model = model
        self._rows, self._valid = dict(rows or {}), dict(valid or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guide = self.fn
        named: dict[str, Any] = {"rows": self._rows, "valid": self._valid}
        serve = functools.partial(dynamic_subsample, model=self._model, **named)
        if guide is None:
            return serve(*args)
        if isinstance(guide, Messenger) and guide.fn is not None:
            # A handler around the guide: it stays around what is served.
            with internals.replaced(guide, fn=serve(guide.fn)):
                return guide(*args, **kwargs)
        if isinstance(guide, functools.partial):
            inside = functools.partial(serve(guide.func), *guide.args, **guide.keywords)
            return inside(*args, **kwargs)
        model: Any = self._model or model_of(guide)
        with ExitStack() as changes:
            in_context = internals.find(dynamic_subsample) is not None
            if not in_context and not _knows_its_parts(guide):
                _route_autoguides(changes)
            return call_guide(guide, model, args, kwargs, **named)

    def __enter__(self) -> dynamic_subsample:
        if internals.find(dynamic_subsample) is None:
            self._routes = ExitStack()
            _route_autoguides(self._routes)
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if internals.find(dynamic_subsample) is None:
            self._routes.close()

    def sample_posterior(
        self,
        rng_key: jax.Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        indices: Rows | None = None,
        **kwargs: Any,
    ) -> dict[str, jax.Array]:
        """Draw latents of all rows, or of some, from the guide.

        Parameters
        ----------
        rng_key : jax.Array
            The random key.
        params : dict
            The parameters, as ``svi.get_params`` returns them.
        *args, **kwargs
            The arguments of the model for which to compute deterministic sites.
            Without any, they are computed for the arguments of the first call, if
            the model runs on all rows with these. Sites that need other arguments are
            left out, with a warning.
        sample_shape : tuple of int
            The shape of the draws.
        indices : dict of str to array, optional
            For some plates, the rows whose latents to return, shape ``(count,)``, in
            this order. Rows that a handler around pins count too.

        Returns
        -------
        dict of str to jax.Array
            By site, draws of shape ``(*sample_shape, ...)``.

        Raises
        ------
        ValueError
            If `indices` name a plate or rows that the model does not have.

        Notes
        -----
        For ``AutoNormal`` and ``AutoDelta``, the memory is that of the rows in
        `indices`. Their draws depend on the number of rows, and on the place of a row
        among them. A joint guide draws all rows, from which these are taken.
        """
        options = {"sample_shape": sample_shape, "indices": indices, **kwargs}
        return self._run_in_context(
            "sample_posterior", rng_key, params, *args, **options
        )

    def median(
        self, params: dict[str, Any], *, indices: Rows | None = None
    ) -> dict[str, jax.Array]:
        """Return the medians of latents of all rows, or of some.

        Parameters
        ----------
        params, indices
            As for ``sample_posterior``.

        Returns
        -------
        dict of str to jax.Array
            By site.
        """
        return self._run_in_context("median", params, indices=indices)

    def quantiles(
        self,
        params: dict[str, Any],
        quantiles: ArrayLike,
        *,
        indices: Rows | None = None,
    ) -> dict[str, jax.Array]:
        """Return quantiles of latents of all rows, or of some.

        Parameters
        ----------
        params, indices
            As for ``sample_posterior``.
        quantiles : array_like
            Numbers between 0 and 1, shape ``(count,)``.

        Returns
        -------
        dict of str to jax.Array
            By site, arrays of shape ``(count, ...)``.
        """
        return self._run_in_context("quantiles", params, quantiles, indices=indices)

    def _run_in_context(
        self, method: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> Any:
        """Run a posterior method of the guide where it is served, as its parts are."""
        if indices is not None:
            kwargs["indices"] = indices
        with dynamic_subsample():
            return getattr(self.fn, method)(*args, **kwargs)

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
        if name in POSTERIOR_METHODS and hasattr(guide, name):
            return functools.partial(self._run_in_context, name)
        return getattr(guide, name)

    def __setattr__(self, name: str, value: Any) -> None:
        guide = vars(self).get("fn")
        # Names with two underscores are what Messenger copies of the guide.
        own = name.startswith("__") or name in _OWN
        if isinstance(guide, AutoGuide) and hasattr(guide, name) and not own:
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
        inside += [f"rows={self._rows!r}"] if self._rows else []
        inside += [f"valid={self._valid!r}"] if self._valid else []
        return f"dynamic_subsample({', '.join(inside)})"

    def __reduce__(self) -> tuple:
        return _rebuild, (self.fn, self._model, self._rows, self._valid)


# Attributes of a wrapper that are never its guide's.
_OWN = ("fn", "_model", "_rows", "_valid", "_routes", "_changes", "_unserved")


def _knows_its_parts(guide: Any) -> bool:
    """Tell whether no function stands between a guide and the autoguides in it."""
    if isinstance(guide, AutoGuideList):
        return all(map(_knows_its_parts, guide))
    return isinstance(guide, AutoGuide)


def _rebuild(guide: Any, model: Any, rows: Any, valid: Any) -> dynamic_subsample:
    return dynamic_subsample(guide, model=model, rows=rows, valid=valid)


def _check_guide(guide: Any, model: Callable | None) -> None:
    """Say what to do with what is no guide, or is one without a model."""
    if isinstance(guide, type):
        why = f"got the class {guide.__name__}. Make a guide of it first: "
        remedy = f"dynamic_subsample({guide.__name__}(model))"
    elif isinstance(guide, SVI):
        why = f"got an {type(guide).__name__}. Wrap its guide before it is made: "
        remedy = "SVI(model, dynamic_subsample(guide), optim, loss)"
    elif isinstance(guide, MCMC | MCMCKernel):
        why = f"got {type(guide).__name__}, which has no guide. Use SVI for batches: "
        remedy = "SVI(model, dynamic_subsample(AutoNormal(model)), optim, loss)"
    elif not callable(guide):
        why = f"got {guide!r}, which cannot be called. "
        remedy = "Give a guide, or nothing, for a context: with dynamic_subsample()"
    elif model is None and model_of(guide) is None:
        why = f"does not know the model of the guide {guide!r}. Name it: "
        remedy = (
            "dynamic_subsample(guide, model=model). If this is the model, wrap a guide "
            "that is made of it: dynamic_subsample(AutoNormal(model))"
        )
    else:
        return
    raise ValueError(f"dynamic_subsample {why}{remedy}.")


def _route_autoguides(changes: ExitStack) -> None:
    """Serve the calls and posterior methods of all autoguides.

    A call is looked up on the guide's class, so this is where it can be met with its
    arguments, in whatever loop it happens.
    """

    def route(guide_class: type) -> None:
        own = {name: vars(guide_class).get(name) for name in _ROUTES}
        routed = {name: _ROUTES[name](run) for name, run in own.items() if run}
        changes.enter_context(internals.replaced(guide_class, **routed))

    for guide_class in (AutoGuide, *_subclasses(AutoGuide)):
        route(guide_class)
    # Classes that are made inside the context.
    changes.enter_context(
        internals.replaced(AutoGuide, __init_subclass__=classmethod(route))
    )
    predict = internals.Predictive.__call__
    changes.enter_context(
        internals.replaced(internals.Predictive, __call__=_aligned_predictions(predict))
    )


def _served_call(run: Any) -> Callable:
    @functools.wraps(run)
    def method(guide: AutoGuide, *args: Any, **kwargs: Any) -> Any:
        run_guide = functools.partial(run, guide)
        return call_guide(guide, guide.model, args, kwargs, run_guide)

    return method


def _aligned_predictions(run: Any) -> Callable:
    @functools.wraps(run)
    def predict(predictive: Any, rng_key: Any, *args: Any, **kwargs: Any) -> Any:
        # A posterior method says itself of which rows its samples are.
        samples = internals.find(Samples)
        of_all_rows = (
            predictive.guide is None if samples is None else samples.of_all_rows
        )
        if of_all_rows:
            check_predictive(predictive, args, kwargs)
        with Samples(of_all_rows):
            return run(predictive, rng_key, *args, **kwargs)

    return predict


def _served_method(run: Any) -> Callable:
    @functools.wraps(run)
    def method(guide: AutoGuide, *args: Any, **kwargs: Any) -> Any:
        name, run_method = run.__name__, functools.partial(run, guide)
        return call_posterior_method(guide, name, run_method, *args, **kwargs)

    return method


_ROUTES = {"__call__": _served_call} | dict.fromkeys(POSTERIOR_METHODS, _served_method)


def _subclasses(guide_class: type) -> Iterator[type]:
    for subclass in guide_class.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
