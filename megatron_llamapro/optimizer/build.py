"""megatron.core's optimizer over the trainable parameters, with a fused AdamW, and its learning-rate schedule.

The kernel is Transformer Engine's or Apex's FusedAdam if installed, else torch's fused AdamW.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import OptimizerConfig, Precision
from megatron_llamapro.model.build import PARAMS_DTYPE
from megatron_llamapro.optimizer.param_groups import param_group_overrides
from megatron_llamapro.optimizer.torch_adam import ResumableDistributedOptimizer, TorchAdamDistributedOptimizer
from megatron_llamapro.runtime.upstream import become


def check_apex() -> None:
    """Raise `ConfigError` if PyPI's `apex`, an unrelated package, shadows NVIDIA's."""
    try:
        spec = importlib.util.find_spec("apex")
        is_nvidias = spec is None or importlib.util.find_spec("apex.optimizers") is not None
    except ImportError:
        is_nvidias = False
    if not is_nvidias:
        raise ConfigError(
            f"the installed package 'apex' ({spec.origin if spec else 'apex'}) is not NVIDIA's Apex: it has no "
            "apex.optimizers.FusedAdam; run 'pip uninstall apex' (torch's fused AdamW is used without it)"
        )


def build_optimizer(
    chunks: Sequence[torch.nn.Module], config: OptimizerConfig, *, precision: Precision
) -> MegatronOptimizer:
    """Build the distributed optimizer over the trainable parameters of `chunks` (wrapped in DDP).

    Raises:
        ConfigError: a parameter-group rule matches nothing, or `apex` is not NVIDIA's.
    """
    check_apex()
    optimizer = get_megatron_optimizer(
        megatron_optimizer.OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=precision == "bf16",
            params_dtype=PARAMS_DTYPE[precision],
            use_distributed_optimizer=True,
        ),
        list(chunks),
        config_overrides=param_group_overrides(chunks, config.param_groups, lr=config.lr, min_lr=config.min_lr),
    )
    for part in optimizer.chained_optimizers:
        become(part, ResumableDistributedOptimizer)
    for part in torch_adam_parts(optimizer):
        _fuse(part)
    return optimizer


def torch_adam_parts(optimizer: MegatronOptimizer) -> Iterable[TorchAdamDistributedOptimizer]:
    """Yield the parts of `optimizer` that run torch's AdamW, as the class that can resume them."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield become(part, TorchAdamDistributedOptimizer)


def _fuse(part: TorchAdamDistributedOptimizer) -> None:
    """Make torch's AdamW update all parameters in one kernel. megatron.core builds it unfused."""
    for group in part.optimizer.param_groups:
        group["foreach"], group["fused"] = False, True


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, *, train_iters: int
) -> OptimizerParamScheduler:
    """Build the schedule, in steps: warm-up from 0 over `lr_warmup_fraction` of the run, then the configured decay."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=int(config.lr_warmup_fraction * train_iters),
        lr_decay_steps=train_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
