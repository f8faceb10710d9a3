"""How pictures look: readable at the width of a README, and in shades of grey."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Lightness, marker and line style all differ.
LOOKS: list[dict[str, Any]] = [
    {"color": "#000000", "marker": "o", "ls": "-"},
    {"color": "#b35806", "marker": "s", "ls": "--"},
    {"color": "#3f8fc4", "marker": "^", "ls": "-"},
    {"color": "#8a8a8a", "marker": "D", "ls": ":"},
]
STYLE = {"markersize": 6, "lw": 1.8}
for look in LOOKS:
    look |= STYLE


def subplots(rows: int, columns: int) -> tuple[Figure, list[Any]]:
    figure = Figure((8, 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel().tolist()
    for ax in axes:
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    # Twice the width that a README shows, for screens with small pixels.
    figure.savefig(path, dpi=200)
