"""Post-pretrain an expanded LLaMA.

    torchrun --nproc-per-node N -m megatron_llamapro.pretrain --config run.yaml [--section.field value …]

One process needs no torchrun: python -m megatron_llamapro.pretrain --config run.yaml
"""

from __future__ import annotations

import os

from megatron_llamapro.config.command import exit_code_of, in_one_line, run_command
from megatron_llamapro.config.errors import LlamaProError, RunError
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.runtime.stop import StopRequest
from megatron_llamapro.training.trackers import check_trackers


def main() -> int:
    """Parse, set up, train, close."""
    stop = StopRequest()  # before the imports, which take seconds
    config, error = _parse()
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.distributed import raise_together, start_world, stop_world
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    start_world(timeout_minutes=config.parallel.distributed_timeout_minutes if config else 10.0)
    try:
        raise_together(error)
        assert config is not None  # raise_together raised otherwise
        _train(config, stop)
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError):
        raise  # a path of the configuration
    except OSError as raised:  # a full disk, a file system that fails
        raise RunError(in_one_line(raised)) from raised
    except LlamaProError as raised:
        if not raised.on_all_ranks:
            raise  # the others are in a collective: to stop the world now would be to wait for them
        stop_world()
        if os.environ.get("RANK", "0") != "0":
            return exit_code_of(raised)  # rank 0 says it
        raise
    finally:
        stop.close()
    stop_world()
    return 0


def _parse() -> tuple[RunConfig | None, LlamaProError | None]:
    try:
        config = parse_run_config()
        if os.environ.get("RANK", "0") == "0":  # the rank that reports
            check_trackers(config.logging)
        return config, None
    except LlamaProError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        return None, error


def _train(config: RunConfig, stop: StopRequest) -> None:
    from megatron_llamapro.runtime.watchdog import Watchdog
    from megatron_llamapro.training.loop import train
    from megatron_llamapro.training.records import claimed, open_writers
    from megatron_llamapro.training.report import print_report
    from megatron_llamapro.training.setup import set_up

    with claimed(config):
        run = set_up(config)
        record = print_report(run)
        with open_writers(config, resumed_at=run.state.iteration) as writers:
            for writer in writers:
                writer.write(record)
            hang_minutes = config.training.hang_timeout_minutes
            train(run, writers, stop, Watchdog(60 * hang_minutes) if hang_minutes else None)


if __name__ == "__main__":
    run_command(main)
