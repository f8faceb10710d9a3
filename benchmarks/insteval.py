"""InstEval as the demo fits it; what else is used of the demo, comes from here."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpyro
from numpyro.infer import TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI
from numpyro_dynamic_subsample.__main__ import (
    LECTURERS,
    LME4,
    STUDENTS,
    cut,
    model,
    shuffled,
    start,
)
from numpyro_dynamic_subsample.__main__ import load as load

BATCH_SIZE = 128  # students
STEPS = -(-STUDENTS // BATCH_SIZE)  # in an epoch
LOSS = TraceMeanField_ELBO()


def parts_of(epoch: int) -> list[np.ndarray]:
    """Return the students of each batch of an epoch."""
    return cut(shuffled(epoch, 0), BATCH_SIZE)


def plates(rows: Any, *_: Any) -> list[Any]:
    return [
        numpyro.plate("lecturers", LECTURERS),
        numpyro.plate("students", STUDENTS, subsample_size=len(rows)),
    ]


def guide(**options: Any) -> AutoNormal:
    return AutoNormal(model, init_loc_fn=init_to_value(values=start()), **options)


def subsample_svi(optimizer: Any) -> SubsampleSVI:
    return SubsampleSVI(model, guide(), optimizer, LOSS)


def deviation(figures: Iterable[float]) -> float:
    """Return by how many percent the worst of the figures differs from lme4's."""
    apart = np.asarray(figures) / list(LME4.values()) - 1
    return 100 * float(np.abs(apart).max())
