"""Mini-batches of any size for NumPyro's automatic guides."""

from importlib.metadata import version as _version

from .batches.groups import RaggedGroups
from .batches.minibatch import Minibatch, minibatch
from .effect.dynamic_subsample import dynamic_subsample
from .effect.pin_rows import pin_rows
from .effect.warn import MisalignedSubsampleWarning, UnscaledSubsampleWarning
from .steps.fit import FitResult
from .steps.subsample_svi import SubsampleSVI

__all__ = [
    "FitResult",
    "Minibatch",
    "MisalignedSubsampleWarning",
    "RaggedGroups",
    "SubsampleSVI",
    "UnscaledSubsampleWarning",
    "dynamic_subsample",
    "minibatch",
    "pin_rows",
]

__version__ = _version("numpyro-dynamic-subsample")
