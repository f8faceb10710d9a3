"""The handler's three forms: around a guide, around a block of code, as a decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from . import internals
from .calls import hold_to_guide
from .changes import numpyro_changed
from .guides import call_guide, model_of
from .posterior import POSTERIOR_METHODS


class dynamic_subsample(hold_to_guide):
    """Let a guide's plates follow the model's, in batches of any size.

    NumPyro's automatic guides record their plates on the first call and keep that
    subsample size. This handler learns the model's plates before a guide runs, by
    running the model with the same arguments. It gives the guide's plates the model's
    subsample size, and the same rows where these are pinned. Local latents keep
    parameters for all rows of their plate, of which a call uses those in the batch.

    Parameters
    ----------
    guide : callable, optional
        The guide to serve: an autoguide, or any callable if `model` is given. Use the
        result in its place; it has the guide's attributes, methods and class. Without
        a guide, the handler is a context manager that serves every autoguide called
        inside it, or, called with a guide function, a decorator.
    model : callable, optional
        The model whose plates the guide follows; by default the autoguide's own.

    Raises
    ------
    ValueError
        When made, if `guide` has no model and none is given. When the guide is called,
        if a plate of the guide is missing in the model or has another full size there;
        if a subsample is smaller than 1 or larger than its plate; if pinned rows are
        not indices into the plate; if data do not fit the plate that they stand in. If
        a wrapped guide is called outside of a context, also if it has
        ``create_plates``, or if the model would need to be changed: if a handler gives
        it values of all rows, or all rows of a plate are pinned in another order and
        parameters with ``event_dim`` or ``numpyro.subsample`` stand there. As a
        context, if the model that runs against a guide asks a plate for another number
        of rows than the guide took, or pins others.

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

    A context changes classes of NumPyro for the whole process while it is entered, and
    leaves guides with ``create_plates`` alone. Posterior methods called inside return
    latents of all rows, or of those that a handler around pins.

    Examples
    --------
    Around a guide, for a model that takes its own data by the plate's rows:

    >>> def indexing(size):
    ...     with numpyro.plate("people", N, subsample_size=size) as rows:
    ...         z = numpyro.sample("z", dist.Normal(0, 1))
    ...         numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(y)[rows])
    >>> guide = dynamic_subsample(AutoNormal(indexing))
    >>> svi = SVI(indexing, guide, optax.adam(0.01), Trace_ELBO())
    >>> state = svi.init(key, 30)
    >>> state, loss = svi.update(state, 11)

    Around all that is done with a guide:

    >>> svi = SVI(indexing, AutoNormal(indexing), optax.adam(0.01), Trace_ELBO())
    >>> with dynamic_subsample():
    ...     state = svi.init(key, 30)
    ...     state, loss = svi.update(state, 11)

    As a decorator of a guide function, whose plate takes as many rows as the model's:

    >>> @dynamic_subsample(model=indexing)
    ... def guide(size):
    ...     loc = numpyro.param("loc", jnp.zeros(N))
    ...     with numpyro.plate("people", N) as rows:
    ...         numpyro.sample("z", dist.Normal(loc[rows], 1))
    >>> handlers.trace(handlers.seed(guide, 0)).get_trace(11)["z"]["value"].shape
    (11,)
    """

    fn: Any

    def __init__(
        self, guide: Callable | None = None, *, model: Callable | None = None
    ) -> None:
        if type(guide) is dynamic_subsample:
            guide, model = guide.fn, model or guide._model
        if guide is not None:
            _check_guide(guide, model)
        super().__init__(guide)
        self._model = model
        self._changes: list[AbstractContextManager[None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guide = self.fn
        serve = functools.partial(dynamic_subsample, model=self._model)
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
        with numpyro_changed():
            return call_guide(guide, model, args, kwargs)

    def __enter__(self) -> dynamic_subsample:
        change = numpyro_changed()
        change.__enter__()
        self._changes.append(change)
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._changes.pop().__exit__(None, None, None)

    def _run_in_context(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a posterior method of the guide where it is served, as its parts are."""
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
        return f"dynamic_subsample({', '.join(inside)})"

    def __reduce__(self) -> tuple:
        return _rebuild, (self.fn, self._model)


# Attributes of a wrapper that are never its guide's.
_OWN = ("fn", "named", "padded", "_model", "_changes")


def _rebuild(guide: Any, model: Any) -> dynamic_subsample:
    return dynamic_subsample(guide, model=model)


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
