"""Mini-batches of any size for NumPyro's automatic guides."""

from .alignment import MisalignedSubsampleWarning
from .dynamic_subsample import dynamic_subsample
from .padding import pad_minibatch
from .subsample_svi import SubsampleSVI

__all__ = [
    "MisalignedSubsampleWarning",
    "SubsampleSVI",
    "dynamic_subsample",
    "pad_minibatch",
]
