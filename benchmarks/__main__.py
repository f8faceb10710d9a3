"""Measure this library beside what one would use instead.

What is compared takes turns, and is given by its median, least and most, without
warm-up rounds. First epochs and whole fits are single runs.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from . import by_hand, fit, peers, predict, ragged, rows, start, steps
from .pairs import HEADER, Row, Series, line

COMMITTED = Path(__file__).parent
PACKAGES = ("numpyro-dynamic-subsample", "numpyro", "jax", "numpy", "optax")
FAMILIES: dict[str, Callable[..., Iterator[Row | Series]]] = {
    "steps": steps.cases,
    "ragged": ragged.cases,
    "rows": rows.cases,
    "fit": fit.cases,
    "predict": predict.cases,
    "by-hand": by_hand.cases,
    "start": start.cases,
    "peers": peers.cases,
}
PICTURES = {"ragged": ragged.draw, "rows": rows.draw, "fit": fit.draw}


def environment() -> dict[str, Any]:
    """Tell where and with what the times were taken."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [own.partition(": ")[2] for own in lines if own.startswith("model name")]
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def measure(cases: Iterator[Row | Series]) -> dict[str, Any]:
    """Print each row as soon as it is there, and keep all of them."""
    where, started = environment(), time.perf_counter()
    rows, series = [], {}
    for found in cases:
        if isinstance(found, Row):
            rows.append(found.record())
            print(line(rows[-1]), flush=True)
        else:
            series = found
    jax.clear_caches()
    took = time.perf_counter() - started
    return {"environment": where, "seconds": took, "rows": rows, "series": series}


def main() -> None:
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
    options = parser.parse_args()

    temporary = Path(tempfile.gettempdir()) / "benchmarks-quick"
    output = options.output or (temporary if options.quick else COMMITTED)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = {name: kept[name] for name in FAMILIES if name in kept}
    families = FAMILIES | {"peers": partial(peers.cases, python=options.peers_python)}
    for name in options.only:
        print(f"\n## {name}\n\n{HEADER}", flush=True)
        results[name] = measure(families[name](options.quick))
        path.write_text(json.dumps(results, indent=1) + "\n")
        tables = [
            f"\n## {name}\n\n{HEADER}\n" + "\n".join(map(line, results[name]["rows"]))
            for name in FAMILIES
            if name in results
        ]
        (output / "RESULTS.md").write_text("\n".join(["# Results", *tables]) + "\n")
        if name in PICTURES:
            PICTURES[name](results[name]["series"], output)
    missed = [
        f"{name}: {row['case']} against {row['against']}"
        for name in options.only
        for row in results[name]["rows"]
        if row.get("met") is False
    ]
    print("\n".join(["\nAims missed:", *missed] if missed else ["\nAll aims met."]))
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
