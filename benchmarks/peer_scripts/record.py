"""What every peer is given and hands back. This needs no more than NumPy."""

import json
from typing import NamedTuple

import numpy as np

FIGURES = ("intercept", "sd_student", "sd_lecturer", "sd_residual")


class Given(NamedTuple):
    student: np.ndarray  # of each rating, as lecturer and y
    lecturer: np.ndarray
    y: np.ndarray
    orders: np.ndarray  # of students, shape (epochs, students)
    batch_size: int  # in students
    rate: float  # Adam's step size, which decays exponentially
    decay: float  # to this part of it
    seconds: float  # after which to give up

    @property
    def of_student(self) -> list[np.ndarray]:
        """Where the ratings of each student are."""
        ends = np.cumsum(np.bincount(self.student))
        return np.split(np.argsort(self.student, kind="stable"), ends[:-1])


def given(path: str) -> Given:
    with np.load(path) as arrays:
        values = {name: arrays[name] for name in Given._fields}
    return Given(**{n: v if v.ndim else v.item() for n, v in values.items()})


def hand_back(
    version: str, steps: int, clock: list[float], figures: list[list[float]]
) -> None:
    """Print what the driver reads: figures after each epoch of so many steps."""
    found = {"version": version, "steps": steps, "clock": clock, "figures": figures}
    print(json.dumps(found))
