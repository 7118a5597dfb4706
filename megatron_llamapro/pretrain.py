"""Post-pretrain an expanded LLaMA.

    torchrun --nproc-per-node N -m megatron_llamapro.pretrain --config run.yaml [--section.field value …]

One process needs no torchrun: llamapro train --config run.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_llamapro.config.command import INTERRUPTED, in_one_line, run_command
from megatron_llamapro.config.errors import LlamaProError, RunError
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.runtime.console import keep_on_printing
from megatron_llamapro.runtime.launched import launched_world_size
from megatron_llamapro.runtime.stop import StopRequest

if TYPE_CHECKING:
    from megatron_llamapro.training.start import Start


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments (default: the command line), check, set up, train, close."""
    stop = StopRequest()  # before the imports, which take seconds
    keep_on_printing()
    try:
        config, start = _read(arguments, stop)
        _run(config, start, stop)
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError):
        raise  # a path in the configuration
    except OSError as raised:  # a full disk, or a file system that fails
        raise RunError(in_one_line(raised)) from raised
    finally:
        stop.close()
    return INTERRUPTED if stop.interrupted else 0


def _read(arguments: Sequence[str] | None, stop: StopRequest) -> tuple[RunConfig, Start | None]:
    """Return the configuration and its `Start`, both checked. This runs seconds before the world starts.

    `Start` is None on all but the first rank of each node. Rank 0's is passed to all ranks later.
    """
    world_size = launched_world_size()  # may fail on this rank alone
    try:
        config = parse_run_config(arguments)

        from megatron_llamapro.checkpoint.formats.folders import what_is_kept
        from megatron_llamapro.training.start import read_start_of_node

        stop.kept = partial(what_is_kept, config.checkpoint.save)
        return config, read_start_of_node(config, world_size=world_size)
    except LlamaProError as error:
        error.on_all_of_node = True
        raise


def _run(config: RunConfig, start: Start | None, stop: StopRequest) -> None:
    from megatron_llamapro.runtime.world import running_world

    with running_world(timeout_minutes=config.parallel.distributed_timeout_minutes):
        _train(config, start, stop)


def _train(config: RunConfig, start: Start | None, stop: StopRequest) -> None:
    from megatron_llamapro.runtime.watchdog import Watchdog
    from megatron_llamapro.training.loop import train
    from megatron_llamapro.training.outputs import claimed, open_writers
    from megatron_llamapro.training.report import print_report
    from megatron_llamapro.training.setup import set_up

    with claimed(config):
        run = set_up(config, read_by_rank_0=start)
        record = print_report(run)
        with open_writers(config, resumed_at=run.state.iteration) as writers:
            for writer in writers:
                writer.write(record)
            hang_minutes = config.training.hang_timeout_minutes
            train(run, writers, stop, Watchdog(60 * hang_minutes) if hang_minutes else None)


if __name__ == "__main__":
    run_command(main)
