"""Know what each family of guides needs while it is called."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import Delta
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoGuideList,
    AutoSemiDAIS,
)

from . import internals
from .calls import follow_model, hold_to_guide
from .first_call import needs_whole_likelihood, set_up
from .internals import CondIndepStackFrame, Handler
from .reading import full_size
from .rows import take_rows
from .warn import looked_at, warn_of_call


def model_of(guide: Any) -> Callable | None:
    """Return the model that a guide was built for, looking through handlers."""
    while guide is not None:
        model = getattr(guide, "model", None)
        if callable(model):
            return model
        guide = getattr(guide, "fn", None) or getattr(guide, "func", None)
    return None


def autoguides_in(guide: Any) -> Iterator[AutoGuide]:
    """Yield the autoguides that a guide consists of, looking through handlers."""
    if not issubclass(type(guide), AutoGuide):
        guide = getattr(guide, "fn", None) or getattr(guide, "func", None)
        if guide is not None:
            yield from autoguides_in(guide)
        return
    yield guide
    parts = guide if isinstance(guide, AutoGuideList) else []
    for part in [guide.global_guide] if isinstance(guide, AutoSemiDAIS) else parts:
        yield from autoguides_in(part)


def joint_over(guide: Any, plate: str) -> AutoContinuous | None:
    """Return the part of a guide that is one joint distribution over a plate's rows."""
    if isinstance(guide, AutoGuideList):
        parts = (joint_over(part, plate) for part in guide)
        return next((part for part in parts if part is not None), None)
    if isinstance(guide, AutoContinuous) and plate in internals.frames(guide):
        return guide
    return None


def call_guide(
    guide: Any,
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    run: Callable | None = None,
) -> Any:
    """Run a guide so that its plates follow the model's.

    Parameters
    ----------
    guide : callable
        The guide. A part of a guide that is being called follows the model of that.
    model : callable
        The model whose plates are followed.
    args, kwargs : tuple, dict
        What both are called with.
    run : callable, optional
        Runs the guide; by default `guide` itself.

    Returns
    -------
    Any
        What the guide returns.
    """
    run = guide if run is None else run
    call = internals.find(follow_model)
    if is_served(guide):
        return run(*args, **kwargs)
    if call is not None:
        with served(guide, call):
            return run(*args, **kwargs)
    if makes_plates(guide):
        return _run_as_it_is(guide, run, args, kwargs)

    def rerun(*args: Any, **kwargs: Any) -> Any:
        return call_guide(guide, model, args, kwargs, run)

    with follow_model(model, args, kwargs) as call, served(guide, call):
        result = run(*args, **kwargs)
    if not call.in_context:
        _refuse_what_a_wrapper_cannot_reach(guide, call)
    warn_of_call(guide, call, rerun)
    return result


def set_up_alone(
    guide: AutoGuide, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Set an autoguide up as its first call would, but leave the call itself out."""
    with follow_model(model, args, kwargs) as call, served(guide, call):
        pass


def has_parts(guide: AutoGuide) -> bool:
    """Tell whether other guides, which are set up as they are called, make this one."""
    return isinstance(guide, AutoGuideList | AutoSemiDAIS)


def makes_plates(guide: Any) -> bool:
    """Tell whether a guide makes its plates by ``create_plates``."""
    return any(part.create_plates is not None for part in autoguides_in(guide))


def refuse_create_plates(guide: Any) -> None:
    """Refuse to wrap a guide that makes its plates by itself."""
    raise ValueError(
        f"The guide {guide!r} has create_plates, and dynamic_subsample makes its "
        "plates follow the model. Leave create_plates out."
    )


def _run_as_it_is(guide: Any, run: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a guide whose plates are made by hand, as NumPyro does."""
    if internals.find(hold_to_guide) is None:
        refuse_create_plates(guide)
    with ExitStack() as marks:
        for part in autoguides_in(guide):
            marks.enter_context(mark_served(part))
        return run(*args, **kwargs)


def _refuse_what_a_wrapper_cannot_reach(guide: Any, call: follow_model) -> None:
    """Refuse a model that would have to be changed, which a wrapper alone cannot."""
    # Once nothing in the model needs it, a guide without latents in plates runs alone.
    done = looked_at(guide)
    if ("context", "") not in done:
        call.read(needed=False)
        done |= set() if call.needs_context else {("context", "")}
    for plate in call.plates.values():
        if plate.is_reordered and plate.gathers:
            raise ValueError(
                f"All {plate.size} rows of plate '{plate.name}' are pinned, but not in "
                "the plate's order. In the model, NumPyro then leaves parameters with "
                "event_dim and numpyro.subsample in that order, which a wrapped guide "
                "cannot change. Enter dynamic_subsample() around the step, or use "
                "SubsampleSVI."
            )


# ------------------------------------------------------------------ all families


def mark_served(guide: AutoGuide) -> AbstractContextManager[None]:
    """Mark a guide as one that is being served, and need not be again."""
    return internals.replaced(guide, _is_served=True)


def is_served(guide: Any) -> bool:
    """Tell whether a guide is being served."""
    return "_is_served" in getattr(guide, "__dict__", {})


@contextmanager
def served(guide: Any, call: follow_model) -> Generator[None]:
    """Give a guide, for as long as it runs, what its family needs."""
    if not issubclass(type(guide), AutoGuide):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(mark_served(guide))
        if guide.prototype_trace is None:
            call.read()
            stack.enter_context(internals.undone_on_error(guide))
            set_up(guide, call)
        _refuse_supports_by_row(guide, call)
        if isinstance(guide, AutoContinuous):
            stack.enter_context(_joint(guide, call))
        elif isinstance(guide, AutoSemiDAIS):
            stack.enter_context(_local_dais(guide, call))
        yield


def _refuse_supports_by_row(guide: AutoGuide, call: follow_model) -> None:
    """Refuse batches of latents whose support is another one for each row."""
    for name, site in (guide.prototype_trace or {}).items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(site["fn"].support)]
        for frame in site["cond_indep_stack"]:
            axis = frame.dim - site["fn"].event_dim
            if not any(len(own) >= -axis and own[axis] > 1 for own in shapes):
                continue
            size = internals.full_sizes(guide)[frame.name]
            if frame.size != size or not call.plate(frame.name, size).in_order:
                raise ValueError(
                    f"The support of site '{name}' depends on the row of plate "
                    f"'{frame.name}' (size {size}), and a guide keeps that of its "
                    "first call. Sample a latent with one support for all rows, and "
                    "transform it to that of each row."
                )


# ------------------------------------------------------------------ joint guides


@contextmanager
def _joint(guide: AutoContinuous, call: follow_model) -> Generator[None]:
    """Let a joint distribution over all rows give those of the batch.

    The joint density is that of all rows, unscaled. Each site takes the rows of the
    batch and passes through the plate, whose scale makes its log density and the
    model's unbiased estimates of those of all rows.
    """
    frames = internals.frames(guide)
    for name in frames:
        _refuse_enumeration(guide, name)
    plates = {name: _plate(guide, frame) for name, frame in frames.items()}
    some = [name for name in plates if not call.plates[name].in_order]
    if some and internals.under_renyi_elbo():
        raise ValueError(
            f"RenyiELBO takes its bound row by row, and {type(guide).__name__} has no "
            f"density of its own for the rows of plate '{some[0]}'. Use AutoNormal or "
            "Trace_ELBO."
        )

    def rows_of_batch(delta: Delta, plate: Any) -> Delta:
        if plate.name not in some:
            return delta
        rows, size, dim = internals.rows_of(plate), plate.size, plate.dim
        return Delta(
            take_rows(delta.v, rows, size, dim - delta.event_dim),
            take_rows(delta.log_density, rows, size, dim),
            event_dim=delta.event_dim,
        )

    inside = full_size() if needs_whole_likelihood(guide) else nullcontext()
    with _pass_through_plates(guide, plates.__getitem__, rows_of_batch), inside:
        yield


def _refuse_enumeration(guide: AutoGuide, name: str) -> None:
    if internals.enumerating():
        raise ValueError(
            f"TraceEnum_ELBO does not support {type(guide).__name__} with local "
            f"latents, here in plate '{name}' (size "
            f"{internals.full_sizes(guide)[name]}). Use AutoNormal."
        )


def _plate(guide: AutoGuide, frame: CondIndepStackFrame) -> Any:
    size = internals.full_sizes(guide)[frame.name]
    return numpyro.plate(frame.name, size, dim=frame.dim)


class _pass_through_plates(Handler):
    """Passes a guide's local sites, which stand outside all plates, through theirs."""

    def __init__(
        self,
        guide: AutoGuide,
        plate: Callable[[str], Any],
        adapt: Callable[[Delta, Any], Delta],
    ) -> None:
        super().__init__()
        self._prototype: Any = guide.prototype_trace
        self._plate = plate
        self._adapt = adapt

    def process_message(self, msg: dict[str, Any]) -> None:
        site = self._prototype.get(msg.get("name"))
        if msg["type"] != "sample" or site is None or type(msg["fn"]) is not Delta:
            return
        plates = [self._plate(frame.name) for frame in site["cond_indep_stack"]]
        for plate in plates:
            msg["fn"] = self._adapt(msg["fn"], plate)
        for plate in plates:
            plate.process_message(msg)


# ------------------------------------------------------------------ AutoSemiDAIS


@contextmanager
def _local_dais(guide: AutoSemiDAIS, call: follow_model) -> Generator[None]:
    """Give the guide's own record of its plate the size of this call.

    The guide scales the log density of its local sites itself and samples them outside
    of the plate, so that their messages have no scale, which ``TraceMeanField_ELBO``
    needs. Here the plates scale them.
    """
    name, size, _ = internals.local_plate(guide)
    _refuse_enumeration(guide, name)
    if guide.local_guide is not None and internals.under_renyi_elbo():
        raise ValueError(
            f"AutoSemiDAIS spreads the density of its local guide evenly over the rows "
            f"of plate '{name}', and RenyiELBO then exceeds the log evidence. Leave "
            "local_guide out, or use Trace_ELBO."
        )

    @cache
    def plate(name: str) -> Any:
        return _plate(guide, internals.frames(guide)[name])

    def unscaled(delta: Delta, plate: Any) -> Delta:
        if plate.name != name or plate.subsample_size == size:
            return delta
        log_density = delta.log_density * (plate.subsample_size / size)
        return Delta(delta.v, log_density, event_dim=delta.event_dim)

    of_call = (name, size, call.plate(name, size).subsample_size)
    with (
        internals.with_local_plate(guide, of_call),
        _pass_through_plates(guide, plate, unscaled),
    ):
        yield
