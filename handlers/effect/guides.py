"""Know what each family of guides needs while it is called."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import Delta
from numpyro.handlers import substitute
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoGuideList,
    AutoSemiDAIS,
)

from ..batches.padding import valid_rows
from . import internals
from .alignment import check_drawn_rows, check_scales, looked_at
from .first_call import needs_whole_likelihood, set_up
from .guide_call import GuideCall
from .internals import CondIndepStackFrame, Handler
from .model_call import ModelCall
from .plates import (
    arguments_for_plates,
    full_size,
    read_plates,
    take_rows,
)


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
    rows: Mapping[str, str | int] | None = None,
    valid: Mapping[str, str | int] | None = None,
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
    rows, valid : dict of str to str or int, optional
        For some plates, the argument of the model that holds their rows, or the count
        of those that are valid.

    Returns
    -------
    Any
        What the guide returns.
    """
    run = guide if run is None else run
    call = internals.find(GuideCall)
    if call is not None:
        with served(guide, call, args, kwargs):
            return run(*args, **kwargs)
    initialised = isinstance(guide, AutoGuide) and guide.prototype_trace is not None
    needs = internals.frames(guide) if initialised else None
    contexts = [h for h in internals.handlers_around() if isinstance(h, ModelCall)]
    of_rows = dict(ChainMap(dict(rows or {}), *(dict(h._rows) for h in contexts)))
    of_counts = dict(ChainMap(dict(valid or {}), *(dict(h._valid) for h in contexts)))
    pins = arguments_for_plates(model, of_rows, args, kwargs)
    pins = {plate: jnp.asarray(own) for plate, own in pins.items()}
    counts = arguments_for_plates(model, of_counts, args, kwargs)
    if counts and not contexts:
        raise ValueError(
            f"A wrapped guide alone cannot let the model count the valid rows of "
            f"plates {sorted(counts)}. Name them to the context, "
            "dynamic_subsample(valid=...), or to SubsampleSVI."
        )

    def rerun(*args: Any, **kwargs: Any) -> Any:
        return call_guide(guide, model, args, kwargs, run)

    counting = valid_rows(counts) if counts else nullcontext()
    with substitute(data=pins), counting:
        call = GuideCall(model, args, kwargs, needs=needs, counts=counts)
        with call, served(guide, call, args, kwargs):
            result = run(*args, **kwargs)
            for name in {**pins, **counts}:
                # The model takes the rows of a plate of the guide: there has to be one.
                plate = call.plate(name)
                numpyro.plate(name, plate.size, dim=min(plate.dims, default=None))
        if not call.in_context:
            _refuse_what_a_wrapper_cannot_reach(guide, call)
        check_drawn_rows(guide, call, rerun)
        check_scales(guide, call)
    return result


def set_up_alone(
    guide: AutoGuide, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Set an autoguide up as its first call would, but leave the call itself out."""
    call = GuideCall(model, args, kwargs)
    with call, served(guide, call, args, kwargs):
        pass


def has_parts(guide: AutoGuide) -> bool:
    """Tell whether other guides, which are set up as they are called, make this one."""
    return isinstance(guide, AutoGuideList | AutoSemiDAIS)


def _refuse_what_a_wrapper_cannot_reach(guide: Any, call: GuideCall) -> None:
    """Hold a model that the wrapper alone cannot change to rule 3 of ``plates``."""
    # Plates in which the guide has no site are read only if the first reading has found
    # something there. The others are known by now.
    done = looked_at(guide)
    if ("gathers", "") not in done:
        try:
            known = call.read()
        except Exception:
            # An autoguide may be called with what its model cannot run on.
            return
        done |= {("gathers", name) for name, p in call.plates.items() if p.gathers}
        done |= {("gathers", "")} if known else set()
    for what, name in sorted(done):
        if what == "gathers" and name:
            call.plate(name)
    if any(plate.is_reordered for plate in call.plates.values()):
        call.read()
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


class Serving(Handler):
    """Says that a guide is being served, and need not be again."""

    def __init__(self, guide: AutoGuide) -> None:
        super().__init__()
        self.guide = guide


def is_served(guide: AutoGuide) -> bool:
    """Tell whether a guide is being served."""
    handlers = internals.handlers_around()
    return any(isinstance(h, Serving) and h.guide is guide for h in handlers)


@contextmanager
def served(
    guide: Any, call: GuideCall, args: tuple, kwargs: dict[str, Any]
) -> Generator[None]:
    """Give a guide, for as long as it runs, what its family needs."""
    if not issubclass(type(guide), AutoGuide) or is_served(guide):
        yield
        return
    with Serving(guide), internals.with_parts(guide, _part):
        if guide.prototype_trace is not None:
            with _family(guide, call, args, kwargs):
                yield
            return
        call.read()
        with internals.undone_on_error(guide):
            set_up(guide, call, args, kwargs)
            with _family(guide, call, args, kwargs):
                yield


class _Part:
    """A part of a guide, served as the guide is."""

    def __init__(self, guide: AutoGuide) -> None:
        self._guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_guide(self._guide, self._guide.model, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guide, name)


def _part(guide: Any) -> Any:
    return _Part(guide) if issubclass(type(guide), AutoGuide) else guide


def _family(
    guide: AutoGuide, call: GuideCall, args: tuple, kwargs: dict[str, Any]
) -> AbstractContextManager[None]:
    if guide.create_plates is not None:
        _follow_create_plates(guide, call, args, kwargs)
    _refuse_supports_by_row(guide, call)
    if isinstance(guide, AutoContinuous):
        return _joint(guide, call)
    if isinstance(guide, AutoSemiDAIS):
        return _local_dais(guide, call)
    return nullcontext()


def _refuse_supports_by_row(guide: AutoGuide, call: GuideCall) -> None:
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


def _follow_create_plates(
    guide: AutoGuide, call: GuideCall, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Let the user's plates decide where the model asks for no size."""
    make: Any = guide.create_plates
    made = read_plates(make, args, kwargs, internals.handlers_around(call))
    for own in made.values():
        plate = call.plate(own.name, own.size)
        if plate.argument is None and plate.pinned_by is None:
            call.plates[own.name] = replace(
                own, dims=plate.dims, pinned_by=None, rows=None
            )
        elif plate.subsample_size != own.subsample_size:
            raise ValueError(
                f"create_plates gives plate '{own.name}' (size {own.size}) "
                f"{own.subsample_size} rows, but the model asks for "
                f"{plate.subsample_size}. Leave create_plates out, and give the number "
                f"of rows to the model's plate: numpyro.plate('{own.name}', "
                f"{own.size}, subsample_size=...)."
            )


# ------------------------------------------------------------------ joint guides


@contextmanager
def _joint(guide: AutoContinuous, call: GuideCall) -> Generator[None]:
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
    with _SitesInPlates(guide, plates.__getitem__, rows_of_batch), inside:
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


class _SitesInPlates(Handler):
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
def _local_dais(guide: AutoSemiDAIS, call: GuideCall) -> Generator[None]:
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
        _SitesInPlates(guide, plate, unscaled),
    ):
        yield
