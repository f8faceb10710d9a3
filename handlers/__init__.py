"""Mini-batches of any size for NumPyro's automatic guides."""

from .dynamic_subsample import dynamic_subsample
from .padding import pad_minibatch
from .subsample_svi import SubsampleSVI

__all__ = ["SubsampleSVI", "dynamic_subsample", "pad_minibatch"]
