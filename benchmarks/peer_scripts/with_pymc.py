"""Fit InstEval with PyMC's ADVI and pm.Minibatch."""

import sys
import time
from typing import Any

import numpy as np
import pymc as pm
import pytensor

from benchmarks.peer_scripts.record import FIGURES, given, hand_back

data = given(sys.argv[1])
students, lecturers = int(data.student.max()) + 1, int(data.lecturer.max()) + 1
steps = -(-students // data.batch_size)
all_steps = len(data.orders) * steps

started = time.perf_counter()
columns = data.student, data.lecturer, data.y.astype(float)
batches: Any = pm.Minibatch(*columns, batch_size=len(data.y) // steps)
student, lecturer, y = batches
with pm.Model() as model:
    intercept = pm.Normal("intercept", 3.0, 2.0)
    sd_student = pm.HalfNormal("sd_student", 2.0)
    sd_lecturer = pm.HalfNormal("sd_lecturer", 2.0)
    sd_residual = pm.HalfNormal("sd_residual", 2.0)
    lecturer_effect = pm.Normal("lecturer", intercept, sd_lecturer, shape=lecturers)
    student_effect = pm.Normal("student", 0.0, sd_student, shape=students)
    mean = lecturer_effect[lecturer] + student_effect[student]
    pm.Normal("y", mean, sd_residual, observed=y, total_size=len(data.y))

rate = pytensor.shared(np.asarray(data.rate, dtype=pytensor.config.floatX))
clock: list[float] = []
figures: list[list[float]] = []
reading = 0.0


def record(approx: Any, losses: Any, step: int) -> None:
    global reading
    now = time.perf_counter()
    rate.set_value(
        np.asarray(data.rate * data.decay ** (step / all_steps), dtype=rate.dtype)
    )
    if step % steps == 0:
        clock.append(now - started - reading)
        (group,) = approx.groups
        loc = group.params_dict["mu"].get_value()
        own = {name: loc[where[1]] for name, where in group.ordering.items()}
        of_name = [own[name if name in own else f"{name}_log__"] for name in FIGURES]
        values = [value.item() for value in of_name]
        figures.append([values[0], *np.exp(values[1:]).tolist()])
        reading += time.perf_counter() - now
        if clock[-1] > data.seconds:
            raise StopIteration


start = {
    "intercept": 3.0,
    "sd_student": 1.0,
    "sd_lecturer": 1.0,
    "sd_residual": 1.0,
    "lecturer": np.full(lecturers, 3.0),
    "student": np.zeros(students),
}
with model:
    pm.fit(
        all_steps,
        method="advi",
        start=start,
        obj_optimizer=pm.adam(learning_rate=rate),
        callbacks=[record],
        progressbar=False,
        random_seed=0,
    )
hand_back(f"PyMC {pm.__version__}", steps, clock, figures)
