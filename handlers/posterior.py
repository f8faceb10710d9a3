"""Answer questions about the posterior after training on batches of any size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions.transforms import biject_to
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoGuide, AutoSemiDAIS
from numpyro.primitives import Messenger
from numpyro.util import find_stack_level

from .guide_call import GuideCall
from .guides import served
from .plates import full_size, rows_of_enclosing

QUESTIONS = ("sample_posterior", "median", "quantiles", "get_transform")

_asked: list[AutoGuide] = []


def ask_autoguide(
    guide: AutoGuide, question: str, run: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Run a posterior method of an autoguide, whatever its first call's size was.

    Latents come back for all rows. Deterministic sites are those of the model's
    arguments where these are given, else those of the first call's at full size.
    Where the model cannot be run so, they are left out with a warning.

    Parameters
    ----------
    guide : AutoGuide
        The guide, trained on batches of whatever sizes.
    question : str
        One of `QUESTIONS`.
    run : callable
        The class's own method of that name.
    args, kwargs : tuple, dict
        What the method is called with.

    Returns
    -------
    Any
        What the method returns.
    """
    if guide.prototype_trace is None or any(guide is other for other in _asked):
        return run(guide, *args, **kwargs)
    model_args, model_kwargs = (), {}
    if question == "sample_posterior":
        model_args = args[2:]
        own = ("rng_key", "params", "sample_shape")
        model_kwargs = {k: v for k, v in kwargs.items() if k not in own}
    _asked.append(guide)
    try:
        if isinstance(guide, AutoSemiDAIS):
            # Its local latents are functions of their data: it runs as when called.
            with (
                GuideCall(guide.model, model_args, model_kwargs) as call,
                served(guide, call, model_args, model_kwargs),
            ):
                return run(guide, *args, **kwargs)
        if model_args or model_kwargs:
            params = args[1] if len(args) > 1 else kwargs["params"]
            latents = _latents(guide, run, args, kwargs)
            return latents | _deterministic(
                guide, latents, params, model_args, model_kwargs
            )
        try:
            with full_size():
                return run(guide, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if not _deterministic_names(guide):
                raise
            answer = _latents(guide, run, args, kwargs)
            warnings.warn(
                f"Left out the deterministic sites {_deterministic_names(guide)}: the "
                "model cannot be run on all rows with the arguments of its first call "
                f"({error}). Pass the model's arguments to get them: "
                "sample_posterior(rng_key, params, *args).",
                stacklevel=find_stack_level(),
            )
            return answer
    finally:
        _asked.pop()


def _deterministic_names(guide: AutoGuide) -> list[str]:
    prototype: Any = guide.prototype_trace
    return [n for n, site in prototype.items() if site["type"] == "deterministic"]


def _latents(guide: AutoGuide, run: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a posterior method for the latents alone, which needs no run of the model."""
    prototype: Any = guide.prototype_trace

    def constrain(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: biject_to(prototype[name]["fn"].support)(value)
            for name, value in values.items()
            if prototype[name]["type"] == "sample"
        }

    without = {k: v for k, v in prototype.items() if v["type"] != "deterministic"}
    with (
        _replaced(guide, _postprocess_fn=constrain, prototype_trace=without),
        full_size(),
    ):
        return run(guide, *args, **kwargs)


@contextmanager
def _replaced(guide: AutoGuide, **attributes: Any) -> Generator[None]:
    as_they_were = {name: getattr(guide, name) for name in attributes}
    vars(guide).update(attributes)
    try:
        yield
    finally:
        vars(guide).update(as_they_were)


def _deterministic(
    guide: AutoGuide,
    latents: dict[str, jax.Array],
    params: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, jax.Array]:
    names = _deterministic_names(guide)
    if not names:
        return {}
    prototype: Any = guide.prototype_trace
    name, value = next(iter(latents.items()))
    batch_ndims = jnp.ndim(value) - jnp.ndim(prototype[name]["value"])
    predictive = Predictive(
        guide.model,
        latents,
        params=params,
        return_sites=names,
        batch_ndims=batch_ndims,
    )
    with LatentsOfAllRows():
        return predictive(jax.random.key(0), *args, **kwargs)


class LatentsOfAllRows(Messenger):
    """Let a model run on a batch be given latents for all rows of its plates."""

    def process_message(self, msg: dict[str, Any]) -> None:
        given = msg["type"] == "sample" and msg["value"] is not None
        if given and not msg["is_observed"]:
            msg["value"] = rows_of_enclosing(msg["value"], msg)
