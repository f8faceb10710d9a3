"""Fit InstEval with Pyro: ragged batches of students, plates made by hand, no jit."""

import sys
import time
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import ExponentialLR

from benchmarks.peer_scripts.record import FIGURES, given, hand_back

data = given(sys.argv[1])
of_student = data.of_student
students, lecturers = len(of_student), int(data.lecturer.max()) + 1
first = data.batch_size


def create_plates(rows: Any, student: Any, lecturer: Any, y: Any) -> list[Any]:
    return [
        pyro.plate("lecturers", lecturers),
        pyro.plate("students", students, subsample=rows),
    ]


def model(rows: Any, student: Any, lecturer: Any, y: Any) -> None:
    intercept = pyro.sample("intercept", dist.Normal(3.0, 2.0))
    sd_student = pyro.sample("sd_student", dist.HalfNormal(2.0))
    sd_lecturer = pyro.sample("sd_lecturer", dist.HalfNormal(2.0))
    sd_residual = pyro.sample("sd_residual", dist.HalfNormal(2.0))
    of_lecturers, of_students = create_plates(rows, student, lecturer, y)
    with of_lecturers:
        lecturer_effect = pyro.sample("lecturer", dist.Normal(intercept, sd_lecturer))
    with of_students:
        student_effect = pyro.sample("student", dist.Normal(0.0, sd_student))
    mean = lecturer_effect[lecturer] + student_effect[student]
    scale = pyro.poutine.scale(scale=students / len(rows))
    with scale, pyro.plate("ratings", len(y)):
        pyro.sample("y", dist.Normal(mean, sd_residual), obs=y)


pyro.set_rng_seed(0)
start = {
    "intercept": torch.tensor(3.0),
    "sd_student": torch.tensor(1.0),
    "sd_lecturer": torch.tensor(1.0),
    "sd_residual": torch.tensor(1.0),
    "lecturer": torch.full((lecturers,), 3.0),
    "student": torch.zeros(first),
}
started = time.perf_counter()
guide = AutoNormal(
    model, init_loc_fn=init_to_value(values=start), create_plates=create_plates
)
steps = -(-students // data.batch_size)
scheduler = ExponentialLR(
    {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": data.rate},
        "gamma": data.decay ** (1 / (steps * len(data.orders))),
    }
)
svi = SVI(model, guide, scheduler, TraceMeanField_ELBO())
clock, figures, reading = [], [], 0.0
for order in data.orders:
    for cut in range(0, students, data.batch_size):
        rows = order[cut : cut + data.batch_size]
        counts = [len(of_student[row]) for row in rows]
        places = np.concatenate([of_student[row] for row in rows])
        student = np.repeat(np.arange(len(rows)), counts)
        batch = rows, student, data.lecturer[places].astype("int64"), data.y[places]
        svi.step(*map(torch.as_tensor, batch))
        scheduler.step()
    now = time.perf_counter()
    clock.append(now - started - reading)
    median = guide.median()
    figures.append([median[name].item() for name in FIGURES])
    reading += time.perf_counter() - now
    if clock[-1] > data.seconds:
        break
hand_back(f"Pyro {pyro.__version__}", steps, clock, figures)
