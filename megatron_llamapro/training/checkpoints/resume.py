"""Checks whether a run can resume from the checkpoint in its folder: same model, same trainable part, same data.

The checks need only small files, so they run before a model is built.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_llamapro.checkpoint.formats.folders import COMMON_STATE, LATEST, latest_checkpoint
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles, check_loadable
from megatron_llamapro.config.checks import check_samples, left_out
from megatron_llamapro.config.errors import CheckpointError, ConfigError
from megatron_llamapro.config.io import to_plain
from megatron_llamapro.config.schema import LoraConfig, RunConfig
from megatron_llamapro.data.sampling import check_same_order, data_order_fingerprint
from megatron_llamapro.data.token_files import TokenFile

PROGRESS = "progress"

_START_ANEW = "restore it, or start a new run in another checkpoint.save"


@dataclass(frozen=True)
class RunIdentity:
    """Settings that must not change between the starts of one run; saved with every checkpoint."""

    data_order: Mapping[str, object]
    trainable: list[str]
    param_groups: list[dict]
    lora: dict


def run_identity(config: RunConfig, token_files: Mapping[str, TokenFile]) -> RunIdentity:
    """Return the identity of a run as it is configured now. `token_files` are the data's, by prefix."""
    return RunIdentity(
        data_order=data_order_fingerprint(
            config.data, num_samples=config.data_order_samples, seed=config.training.seed, checked=token_files
        ),
        trainable=sorted(config.model.trainable),
        param_groups=[to_plain(rule) for rule in config.optimizer.param_groups],
        lora=to_plain(config.lora),
    )


def checkpoint_to_resume(config: RunConfig, source: SmallFiles, identity: RunIdentity) -> SmallFiles | None:
    """Return the newest checkpoint of the run that starts from `source`, or None if it has none yet.

    Raises:
        CheckpointError: the folder holds a run of another model, or is damaged.
        ConfigError, DataError: the run started with other settings, and they cannot change later.
    """
    folder = latest_checkpoint(Path(config.checkpoint.save)) if config.checkpoint.save else None
    if folder is None:
        _check_new(config, source)
        return None
    found = SmallFiles(folder)
    if found.manifest_or_error() != source.manifest:
        raise CheckpointError(
            f"{folder} belongs to a run of another model than model.checkpoint ({config.model.checkpoint}): choose "
            "another checkpoint.save, or the model.checkpoint that it started with"
        )
    check_loadable(found)
    stored = read_progress(found)
    check_same_order(stored["data_order"], identity.data_order, train=config.data.train)
    stored.setdefault("lora", to_plain(LoraConfig()))  # earlier versions had none
    for called in ("model.trainable", "optimizer.param_groups", "lora"):
        name = called.rpartition(".")[2]
        if stored[name] != getattr(identity, name):
            raise ConfigError(
                f"the run in checkpoint.save started with {called} {stored[name]}, now {getattr(identity, name)}: "
                f"its optimizer state would not fit; {_START_ANEW}"
            )
    check_samples(config, iteration=stored["iteration"], consumed_samples=stored["consumed_samples"])
    _check_skips(config, stored)
    return found.read_all()


def _check_new(config: RunConfig, source: SmallFiles) -> None:
    check_samples(config)
    if source.adapters:
        raise CheckpointError(
            f"{source.folder} has low-rank adapters beside its weights, and a new run would leave them out: merge them "
            f"first (llamapro convert megatron-to-megatron --source {source.folder} --target MERGED)"
        )


def _check_skips(config: RunConfig, stored: Mapping) -> None:
    """Raise `ConfigError` if a step to leave out was already trained on."""
    done, skipped = stored["iteration"], set(stored.get("skipped_steps", ()))
    late = [step for steps in left_out(config.training) for step in steps if step <= done and step not in skipped]
    if late:
        raise ConfigError(
            f"training.skip_iterations names step {late[0]}, but the run resumes from step {done} and was trained on "
            f"it: remove it from the list, or write the step of an earlier checkpoint into checkpoint.save's {LATEST}"
        )


def read_progress(source: SmallFiles) -> dict:
    """Return the progress that a training checkpoint stores of its run.

    Raises:
        CheckpointError: it stores none, because it was not written by training or is damaged.
    """
    try:
        return torch.load(io.BytesIO(source.common_state or b""), weights_only=True)[PROGRESS]
    except (OSError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"cannot resume from {source.folder}: no training state in {COMMON_STATE}: {error!r}"
        ) from None
