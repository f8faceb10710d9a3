"""Fit InstEval with this library."""

import sys

import numpyro
import optax

from benchmarks.insteval import STEPS, fit
from benchmarks.peer_scripts.record import given, hand_back
from numpyro_dynamic_subsample.__main__ import by_student

data = given(sys.argv[1])
ratings = by_student(data.student, data.lecturer, data.y)
schedule = optax.exponential_decay(data.rate, len(data.orders) * STEPS, data.decay)
epochs = list(fit(ratings, data.orders, optax.adam(schedule)))
clock, figures = zip(*epochs, strict=True)
hand_back(f"numpyro {numpyro.__version__}", STEPS, list(clock), list(figures))
