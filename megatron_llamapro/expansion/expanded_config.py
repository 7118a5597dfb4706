"""config.json of an expanded model."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.hf_config import MANIFEST_KEY, check_per_layer, family_of, layer_types


def expanded_hf_config(config: Mapping, plan: ExpansionPlan) -> dict:
    """`config` for the model that `plan`'s latest round makes of it, without any manifest: the layer count and every
    field that speaks of single layers."""
    family = family_of(config)
    expanded = {key: value for key, value in config.items() if key != MANIFEST_KEY}
    old_count = config["num_hidden_layers"]
    types = layer_types({**family.defaults, **config}, family, old_count)
    if len(set(types)) > 1:  # a first windowed layer alone may not describe what the plan makes of it
        expanded["layer_types"] = types
    expanded["num_hidden_layers"] = plan.num_layers
    for name in family.per_layer_fields:
        values = expanded.get(name)
        if values is not None:
            check_per_layer(name, values, old_count)
            expanded[name] = [values[layer.parent_layer] for layer in plan.layers]
    for name in family.layer_count_fields:
        if type(config.get(name)) is int:
            beyond = max(0, config[name] - old_count)
            expanded[name] = sum(layer.parent_layer < config[name] for layer in plan.layers) + beyond
    return expanded
