"""Empty panels for a picture file, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.config.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def panels(
    output: Path, num_rows: int, num_columns: int, *, width: float, height: float, same_scale: bool = False
) -> Iterator[list[list[Axes]]]:
    """Yield empty panels of this size in inches, in rows, and write them into `output` at the end. Its extension sets
    the format. With `same_scale`, the panels of a row share their vertical axis.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        num_rows,
        num_columns,
        figsize=(width * num_columns, height * num_rows),
        layout="constrained",
        squeeze=False,
        sharey="row" if same_scale else False,
    )
    for axis in grid.flat:
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    try:
        yield grid.tolist()
        try:
            figure.savefig(output, dpi=150)
        except ValueError as error:
            raise ConfigError(f"{output}: {error}") from None
    finally:
        pyplot.close(figure)
