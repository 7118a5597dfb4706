"""Parameter groups as megatron.core's `config_overrides`, from a table of rules over global parameter names.

megatron.core puts frozen parameters in no group, so freeze first. It merges the groups over all ranks, so a rank with
nothing to train still takes part. Its own keys match stage-local names. Ours match marks, which are set on the
parameters by their global names. Works with any megatron.core GPTModel; see docs/in_your_own_loop.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import ParamGroupRule
from megatron_llamapro.model.names import named_parameters

_RULE_MARK = "llamapro_param_group_rule"


def param_group_overrides(
    chunks: Iterable[torch.nn.Module], rules: Sequence[ParamGroupRule] = (), *, lr: float, min_lr: float = 0.0
) -> dict[ParamKey, dict[str, float]]:
    """Return `get_megatron_optimizer`'s `config_overrides`: no weight decay on norms and biases, then the user's rules.

    The first rule that matches a parameter applies. `lr` and `min_lr` are those of megatron.core's `OptimizerConfig`.

    All ranks call it, after `freeze`.

    Raises:
        ConfigError: a rule matches no trainable parameter on any rank.
    """
    _check_all_matched(rules, _mark_parameters(chunks, rules))

    def decays_nothing(parameter: torch.nn.Parameter) -> bool:
        rule = getattr(parameter, _RULE_MARK, None)
        return parameter.dim() == 1 and (rule is None or rules[rule].wd_mult is None)

    overrides = {_key("norms_and_biases", decays_nothing): {"wd_mult": 0.0}}
    for index, rule in enumerate(rules):
        # lr_mult has no effect of its own: a resumed optimizer uses it to tell its groups apart.
        settings = {
            "max_lr": lr * rule.lr_mult,
            "min_lr": min_lr * rule.lr_mult,
            "lr_mult": rule.lr_mult,
        }
        if rule.wd_mult is not None:
            settings["wd_mult"] = rule.wd_mult
        overrides[_key(f"rule_{index}", partial(_has_mark, index))] = settings
    return overrides


def _key(name: str, matches: Callable[[torch.nn.Parameter], bool]) -> ParamKey:
    return ParamKey(predicate=ParamPredicate(name=name, fn=matches))


def _has_mark(index: int, parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, _RULE_MARK, None) == index


def _mark_parameters(chunks: Iterable[torch.nn.Module], rules: Sequence[ParamGroupRule]) -> list[bool]:
    """Mark each trainable parameter with the first rule that matches it. Return which rules matched on this rank."""
    matched = [False] * len(rules)
    for named in named_parameters(chunks):
        if hasattr(named.parameter, _RULE_MARK):
            delattr(named.parameter, _RULE_MARK)
        if not named.parameter.requires_grad:
            continue
        for index, rule in enumerate(rules):
            if fnmatchcase(named.name, rule.match):
                setattr(named.parameter, _RULE_MARK, index)
                matched[index] = True
                break
    return matched


def _check_all_matched(rules: Sequence[ParamGroupRule], matched: list[bool]) -> None:
    if not rules:
        return
    anywhere = [matched]
    if torch.distributed.is_initialized():
        anywhere = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(anywhere, matched)
    for index, rule in enumerate(rules):
        if not any(rank[index] for rank in anywhere):
            raise ConfigError(
                f"optimizer.param_groups: '{rule.match}' matches no trainable parameter (an earlier rule may take "
                "it first); names look like decoder.layers.39.mlp.linear_fc2.weight"
            )
