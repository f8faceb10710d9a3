"""Know what each family of guides needs while it is called."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpyro
from numpyro.distributions import Delta
from numpyro.distributions.transforms import biject_to
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDAIS,
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
from numpyro.infer.initialization import init_to_uniform, init_to_value
from numpyro.primitives import _PYRO_STACK, CondIndepStackFrame, Messenger

from .alignment import under_enumeration
from .guide_call import GuideCall
from .plates import (
    full_size,
    plates_of_latents,
    rehearsal,
    rows_of_enclosing,
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


def joint_over(guide: Any, plate: str) -> AutoContinuous | None:
    """Return the part of a guide that is one joint distribution over a plate's rows."""
    if isinstance(guide, AutoGuideList):
        parts = (joint_over(part, plate) for part in guide)
        return next((part for part in parts if part is not None), None)
    if isinstance(guide, AutoContinuous) and plate in guide._prototype_frames:
        return guide
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
        with served(guide, call, args, kwargs):
            return run(guide, *args, **kwargs)


@contextmanager
def served(
    guide: AutoGuide, call: GuideCall, args: tuple, kwargs: dict[str, Any]
) -> Generator[None]:
    """Give a guide, for as long as it runs, what its family needs."""
    if guide.prototype_trace is None:
        call.read_all()
        with _undone_on_error(guide):
            _set_up_prototype(guide, call, args, kwargs)
            with _family(guide, call):
                yield
    else:
        call.expect(guide._prototype_frames)
        with _family(guide, call):
            yield


@contextmanager
def _undone_on_error(guide: AutoGuide) -> Generator[None]:
    """Leave no half-made prototype behind, which would pass for a whole one."""
    as_it_was = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(guide).items()
    }
    try:
        yield
    except BaseException:
        vars(guide).clear()
        vars(guide).update(as_it_was)
        raise


def _family(guide: AutoGuide, call: GuideCall) -> AbstractContextManager[None]:
    if isinstance(guide, AutoContinuous):
        return _joint(guide, call)
    if isinstance(guide, AutoSemiDAIS):
        return _local_dais(guide, call)
    return _create_plates_checked(guide, call)


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


# ------------------------------------------------------------------ the first call


def _set_up_prototype(
    guide: AutoGuide, call: GuideCall, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Make the guide's prototype where NumPyro's own way would not do."""
    # A part made with block(model, expose=...) does not see the plates of its sites.
    for plate in call.plates():
        guide._prototype_frame_full_sizes.setdefault(plate.name, plate.size)
    subsampled = {p.name for p in call.plates() if p.subsample_size != p.size}
    if isinstance(guide, AutoContinuous):
        # AutoDAIS evaluates the likelihood of the whole data; the others only need
        # one latent for every row.
        if subsampled and not _needs_whole_likelihood(guide):
            local = plates_of_latents(guide.model, args, kwargs)
            subsampled &= set().union(*local.values())
        if subsampled:
            _set_up_at_full_size(guide, min(subsampled), call, args, kwargs)
        else:
            guide._setup_prototype(*args, **kwargs)
    elif isinstance(guide, AutoSemiDAIS):
        guide._setup_prototype(*args, **kwargs)
    elif subsampled and getattr(guide.init_loc_fn, "func", None) is init_to_value:
        _set_up_from_values(guide, args, kwargs)


def _needs_whole_likelihood(guide: AutoGuide) -> bool:
    return isinstance(guide, AutoDAIS) and not isinstance(
        guide, AutoSurrogateLikelihoodDAIS
    )


def _set_up_at_full_size(
    guide: AutoContinuous,
    name: str,
    call: GuideCall,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    try:
        with rehearsal(), full_size():
            guide.model(*args, **kwargs)
    except (TypeError, ValueError) as error:
        plate = call.model_plate(name)
        raise ValueError(
            f"{type(guide).__name__} is one joint distribution over all rows of plate "
            f"'{name}' (size {plate.size}), so the first call has to run the model at "
            f"full size. With these arguments, which bring {plate.subsample_size} "
            f"rows, it cannot: {error}. Make the first call, svi.init, with the full "
            "data; later calls may bring batches of any size."
        ) from error
    with full_size():
        guide._setup_prototype(*args, **kwargs)


def _set_up_from_values(guide: AutoGuide, args: tuple, kwargs: dict[str, Any]) -> None:
    """Start every row where ``init_to_value`` says, those outside the batch too."""
    init_loc_fn: Any = guide.init_loc_fn
    values = init_loc_fn.keywords.get("values", {})
    guide.init_loc_fn = partial(_init_to_rows_of_value, values=values)
    try:
        guide._setup_prototype(*args, **kwargs)
    finally:
        guide.init_loc_fn = init_loc_fn
    prototype: Any = guide.prototype_trace
    for name, init_loc in getattr(guide, "_init_locs", {}).items():
        if name not in values:
            continue
        value = values[name]
        if not isinstance(guide, AutoDelta):
            value = biject_to(prototype[name]["fn"].support).inv(value)
        guide._init_locs[name] = jnp.broadcast_to(value, jnp.shape(init_loc))


def _init_to_rows_of_value(site: dict[str, Any], values: dict[str, Any]) -> Any:
    """Do as ``init_to_value``, with values for all rows of a subsampled plate."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    if site["name"] not in values:
        return init_to_uniform(site)
    return rows_of_enclosing(values[site["name"]], site)


# ------------------------------------------------------------------ joint guides


@contextmanager
def _joint(guide: AutoContinuous, call: GuideCall) -> Generator[None]:
    """Let a joint distribution over all rows give those of the batch.

    The joint density is that of all rows, unscaled. Each site takes the rows of the
    batch and passes through the plate, whose scale makes its log density and the
    model's unbiased estimates of those of all rows.
    """
    for name in guide._prototype_frames:
        _refuse_enumeration(guide, name)
    plates = {
        name: _plate(guide, frame) for name, frame in guide._prototype_frames.items()
    }
    subsampled = [name for name in plates if call.takes_some(name)]
    if subsampled and _under_renyi_elbo():
        raise ValueError(
            f"RenyiELBO takes its bound row by row, and {type(guide).__name__} has no "
            f"density of its own for the rows of plate '{subsampled[0]}'. Use "
            "AutoNormal or Trace_ELBO."
        )

    def rows_of_batch(delta: Delta, plate: Any) -> Delta:
        if plate.name not in subsampled:
            return delta
        rows, size, dim = plate._indices, plate.size, plate.dim
        return Delta(
            take_rows(delta.v, rows, size, dim - delta.event_dim),
            take_rows(delta.log_density, rows, size, dim),
            event_dim=delta.event_dim,
        )

    with _SitesInPlates(guide, plates.__getitem__, rows_of_batch):
        if _needs_whole_likelihood(guide):
            with full_size():
                yield
        else:
            yield


def _under_renyi_elbo() -> bool:
    # It alone seeds plates apart from sites, so that its particles share their rows.
    return any("sample" in getattr(h, "hide_types", ()) for h in _PYRO_STACK)


def _refuse_enumeration(guide: AutoGuide, name: str) -> None:
    if under_enumeration():
        raise ValueError(
            f"TraceEnum_ELBO does not support {type(guide).__name__} with local "
            f"latents, here in plate '{name}' (size "
            f"{guide._prototype_frame_full_sizes[name]}). Use AutoNormal."
        )


def _plate(guide: AutoGuide, frame: CondIndepStackFrame) -> Any:
    size = guide._prototype_frame_full_sizes[frame.name]
    return numpyro.plate(frame.name, size, dim=frame.dim)


class _SitesInPlates(Messenger):
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

    The guide scales the log density of its local sites itself and samples them
    outside the plate, so that whoever asks a site for its scale, as
    ``TraceMeanField_ELBO`` does, gets none. Here it is left to the plates.
    """
    as_it_was = guide._local_plate
    name, size, _ = as_it_was
    _refuse_enumeration(guide, name)
    if guide.local_guide is not None and _under_renyi_elbo():
        raise ValueError(
            f"AutoSemiDAIS spreads the density of its local guide evenly over the rows "
            f"of plate '{name}', and RenyiELBO then exceeds the log evidence. Leave "
            "local_guide out, or use Trace_ELBO."
        )
    guide._local_plate = (name, size, call.model_plate(name).subsample_size)

    @cache
    def plate(name: str) -> Any:
        return _plate(guide, guide._prototype_frames[name])

    def unscaled(delta: Delta, plate: Any) -> Delta:
        if plate.name != name or plate.subsample_size == size:
            return delta
        log_density = delta.log_density * (plate.subsample_size / size)
        return Delta(delta.v, log_density, event_dim=delta.event_dim)

    try:
        with _SitesInPlates(guide, plate, unscaled):
            yield
    finally:
        guide._local_plate = as_it_was
