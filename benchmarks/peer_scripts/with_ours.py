"""Fit InstEval with this library."""

import sys

import numpyro
import optax

from benchmarks.insteval import STEPS, fit
from benchmarks.peer_scripts.record import given, hand_back
from numpyro_dynamic_subsample.__main__ import Ratings

data = given(sys.argv[1])
ratings = Ratings(data.lecturer, data.y, data.of_student)
schedule = optax.exponential_decay(data.rate, len(data.orders) * STEPS, data.decay)
epochs = list(fit(ratings, data.orders, optax.adam(schedule)))
clock, figures = zip(*epochs, strict=True)
hand_back(f"numpyro {numpyro.__version__}", STEPS, list(clock), list(figures))
