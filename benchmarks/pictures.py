"""How pictures look: readable at the width of a README, and in shades of grey."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Lightness, marker and line style all differ.
LOOKS: list[dict[str, Any]] = [
    {"markersize": 6, "lw": 1.8, "color": color, "marker": marker, "ls": line}
    for color, marker, line in (
        ("#000000", "o", "-"),
        ("#b35806", "s", "--"),
        ("#3f8fc4", "^", "-."),
    )
]


def subplots(columns: int) -> tuple[Figure, list[Any]]:
    figure = Figure((8, 3.6), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    # Twice the width that a README shows, for screens with small pixels.
    figure.savefig(path, dpi=200)
