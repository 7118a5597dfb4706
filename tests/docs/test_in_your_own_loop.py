"""The page's code, run as it stands on megatron.core's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pages import blocks

from megatron_llamapro.model.names import named_parameters
from megatron_llamapro.testing.distributed import run_distributed


def page_code() -> dict:
    """Everything that the page's Python blocks define."""
    names: dict = {}
    exec("\n".join(blocks("docs/in_your_own_loop.md", "python")), names)
    return names


def loop_worker(folder: Path) -> tuple[torch.Tensor | None, tuple[list[int], ...], float, set[float], list[str]]:
    """A user's loop: megatron.core's GPTModel with megatron.core's own local layers, over two stages."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_llamapro.testing.gather import whole_logits

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=6,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        layernorm_epsilon=1e-6,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        batch_p2p_comm=False,
        cuda_graph_scope=[],
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        256,
        128,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    page = page_code()
    page["load"]([model], folder)
    tokens = torch.arange(3, 35)[None]
    logits = whole_logits([model], tokens, vocab_size=131)
    report = page["freeze_originals"]([model], folder)
    page["skip"]([model], folder)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = page["optimizer_for"]([ddp], lr=1e-3)
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    rates = {group["max_lr"] for group in optimizer.param_groups}
    ddp.zero_grad_buffer()
    page["forward_backward"](
        [ddp],
        num_microbatches=2,
        forward_step_func=lambda _, chunk: (chunk(tokens, tokens - 3, None, labels=tokens), mean_loss),
        data_iterator=[None],
        seq_length=32,
        micro_batch_size=1,
        forward_only=False,
    )
    moving = sorted(named.name for named in named_parameters([ddp]) if with_gradient(named.parameter))
    adapted = page["adapt_originals"]([model], folder, rank=2)
    layers = list(report.trainable_layers), list(adapted.trainable_layers)
    return logits, layers, sum(sizes) / report.num_trainable, rates, moving


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict]:
    return losses.mean(), {}


def with_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and bool(parameter.main_grad.any())


def test_the_page_works(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = tiny_llama(rms_norm_eps=1e-6)
    page_code()["convert"](source, tmp_path / "pro", positions=(2, 5))
    first, last = run_distributed(loop_worker, 2, tmp_path / "pro")
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(source)(torch.arange(3, 35)[None]).logits
    torch.testing.assert_close(last[0], expected, rtol=1e-4, atol=1e-4)
    assert (first[1], last[1]) == (([2], [0, 1]), ([5], [3, 4]))
    assert first[2] == last[2] == 1.0  # the optimizer holds what trains and nothing else
    assert first[3] == {1e-3, 5e-4}
    for layer, moving in ((2, first[4]), (5, last[4])):
        block = f"decoder.layers.{layer}"
        assert moving == [f"{block}.mlp.linear_fc2.weight", f"{block}.self_attention.linear_proj.weight"]
