"""Empty panels for a picture file, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import check_output, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_picture(path: Path | None, *, overwrite: bool) -> None:
    """Call it before computing what is drawn.

    Raises:
        ConfigError: the file exists and may not be replaced, matplotlib is not installed, or it does not support the
            format that the extension names.
    """
    check_output(path, overwrite=overwrite)
    if path is not None:
        _pyplot(path)


def _pyplot(path: Path) -> ModuleType:
    """Return matplotlib's pyplot, if it can write this picture."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import backend_bases, pyplot

    formats = backend_bases.FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"{path}: the format must be one of {', '.join(sorted(formats))}")
    return pyplot


@contextmanager
def panels(
    output: Path, num_rows: int, num_columns: int, *, width: float, height: float, same_scale: bool = False
) -> Iterator[list[list[Axes]]]:
    """Yield empty panels of this size in inches, in rows, and write them into `output` at the end. Its extension sets
    the format. With `same_scale`, the panels of a row share their vertical axis. Raises what `check_picture` raises.
    """
    pyplot = _pyplot(output)
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
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150, format=output.suffix[1:].lower())
        write_atomically(output, picture.getvalue())
    finally:
        pyplot.close(figure)
