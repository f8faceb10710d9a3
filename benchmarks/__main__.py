"""Measure this library beside what one would use instead.

What is compared takes turns, and is given by its median, least and most, without
warm-up rounds. Long fits, and epochs that compile for minutes, are single runs. All
results are waited for.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from . import by_hand, fit, peers, predict, ragged, rows, start, steps
from .pairs import Case, read, table

COMMITTED = Path(__file__).parent
PACKAGES = ("numpyro-dynamic-subsample", "numpyro", "jax", "numpy", "optax", "flax")
FAMILIES: dict[str, Callable[..., list[Case]]] = {
    "steps": steps.jitted_cases,
    "first": steps.first_cases,
    "ragged": ragged.cases,
    "rows": rows.cases,
    "fit": fit.cases,
    "predict": predict.cases,
    "by-hand": by_hand.cases,
    "start": start.cases,
    "peers": peers.cases,
}
PICTURES = {"ragged": ragged.draw, "rows": rows.draw}


def environment() -> dict[str, Any]:
    """Tell where and with what the times were taken."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(family: str, cases: list[Case]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    series: dict[str, Any] = {}
    where, started = environment(), time.perf_counter()
    bar = tqdm(cases, desc=family, unit="case")
    for case in bar:
        bar.set_postfix_str(case.name)
        of_case = case.run()
        found += [row.record() for row in of_case.rows]
        series |= of_case.series
        jax.clear_caches()
    took = time.perf_counter() - started
    return {"environment": where, "seconds": took, "rows": found, "series": series}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=FAMILIES,
        default=list(FAMILIES),
        metavar="NAME",
        help=f"some of {', '.join(FAMILIES)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few sizes and rounds, for seeing that all runs; not kept by default",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write results.json, in which results of other names stay, and "
        f"pictures (default: {COMMITTED.name}/, with --quick a temporary directory)",
    )
    parser.add_argument(
        "--peers-python",
        default=sys.executable,
        metavar="PATH",
        help="a Python interpreter that has Pyro and PyMC (default: this one)",
    )
    options = parser.parse_args(argv)

    quick = options.quick
    temporary = Path(tempfile.gettempdir()) / "benchmarks-quick"
    output = options.output or (temporary if quick else COMMITTED)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results = read(path)
    families = FAMILIES | {"peers": partial(peers.cases, python=options.peers_python)}
    for name in options.only:
        results[name] = measure(name, families[name](quick))
        path.write_text(json.dumps(results, indent=1) + "\n")
        tables = {
            name: table(results[name]["rows"]) for name in FAMILIES if name in results
        }
        text = "".join(f"\n## {name}\n\n{own}\n" for name, own in tables.items())
        (output / "RESULTS.md").write_text(f"# Results\n{text}")
        if name in PICTURES:
            PICTURES[name](results[name]["series"], output)
        print(f"\n## {name}\n\n{tables[name]}\n", flush=True)
    missed = [
        f"{name}: {row['case']} against {row['against']}"
        for name in options.only
        for row in results[name]["rows"]
        if row["met"] is False
    ]
    print("\n".join(["Targets missed:", *missed] if missed else ["All targets met."]))
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
