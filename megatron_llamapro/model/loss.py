"""Output layer and cross-entropy in one operation, in chunks of tokens. Logits are computed once. If the output layer
is frozen, they are never held whole.

The gradient of a token's loss with respect to its logits, softmax - onehot, is known as soon as the logits are. A
frozen output layer needs only its product with the weight. The forward pass computes that product chunk by chunk and
drops the chunk's logits. The backward pass scales each token's row by the gradient of that token's loss. This is exact
and costs the same as the plain way: head forward and head input gradient.

The weight gradient of a trainable output layer is the sum over tokens t of g_t (softmax - onehot)_t^T hidden_t, and
g_t is known only in the backward pass. Recomputing the logits there would cost one more head product. So
softmax - onehot is kept instead, in the weights' dtype and in the logits' memory. No float32 copy of the whole is made
here either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import CrossEntropy
from megatron_llamapro.runtime.upstream import become

# Tokens per chunk. A product of c rows reads the whole weight once: c/2 FLOP per byte in float32, c in bfloat16. A
# Hopper GPU balances near 300 FLOP per byte, so 1,024 tokens hide the reads well. Two CPU cores need far fewer, but
# their threads share small products badly. 1,024 tokens of hidden size 512 by 32,000 entries took 1.15 times as long in
# chunks of 128 tokens as in one chunk, 1.12 in chunks of 256, 1.04 in chunks of 512 (65 MB of logits).
_CHUNK_TOKENS = {"cpu": 512, "cuda": 1024}


@dataclass(frozen=True)
class VocabShard:
    """The rows of the output layer's weight that one tensor-parallel rank holds."""

    first: int
    """Vocabulary entry of its first row."""
    num_entries: int
    """Rows that are entries of the vocabulary. The rows after them are padding and are left out of every product. At
    least 1: a rank with nothing but padding keeps one row, which gets no probability."""
    is_padding: bool
    """Whether the rank has nothing but padding."""
    group: dist.ProcessGroup | None
    """The tensor-parallel group; None if this rank holds all rows."""

    @classmethod
    def of_rank(cls, num_rows: int, *, vocab_size: int, group: dist.ProcessGroup) -> VocabShard:
        first = group.rank() * num_rows
        real = min(num_rows, vocab_size - first)
        return cls(first, max(real, 1), real < 1, group if group.size() > 1 else None)


Kernel = Callable[[torch.Tensor, torch.Tensor, VocabShard], torch.Tensor]
"""(logits [c, entries], labels [c], shard) → losses [c], float32. It overwrites the logits with their gradient."""


def torch_kernel(logits: torch.Tensor, labels: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Compute losses with torch's operations, in float32, on any device and for any split of the vocabulary."""
    work = logits.float()  # the same tensor if it is float32 already
    if shard.is_padding:
        work.fill_(torch.finfo(work.dtype).min)
    row = (labels - shard.first).clamp(0, shard.num_entries - 1)[:, None]
    is_here = (row[:, 0] + shard.first == labels).float()
    target = work.gather(1, row)[:, 0] * is_here
    largest = work.amax(dim=1)
    # The CPU kernel goes row by row, so it can write in place. Other devices do not promise that.
    work = torch.softmax(work, dim=1, out=work if work.device.type == "cpu" else None)
    log_sum = largest - work.amax(dim=1).log()  # the largest probability is exp(0) over the sum
    if shard.group is not None:
        whole, target = _over_all_shards(log_sum, target, shard.group)
        work.mul_((log_sum - whole).exp()[:, None])
        log_sum = whole
    work.scatter_add_(1, row, -is_here[:, None])
    if work is not logits:
        logits.copy_(work)
    return log_sum - target


def _over_all_shards(
    log_sum: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp over the whole vocabulary, and the target's logit from the rank that holds it."""
    largest = log_sum.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sum - largest).exp(), target])
    dist.all_reduce(sums, group=group)
    return largest + sums[0].log(), sums[1]


def liger_kernel(logits: torch.Tensor, labels: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Compute losses with Liger's Triton kernel, with float32 in registers. It needs the whole vocabulary and a GPU; it
    is not run yet."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = liger_cross_entropy(leaf, labels, reduction="none")
        [gradient] = torch.autograd.grad(losses.sum(), leaf)
    logits.copy_(gradient)
    return losses.detach().float()


_KERNELS: dict[CrossEntropy, Kernel] = {"chunked": torch_kernel, "liger": liger_kernel}


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [tokens, h], weight [rows, h], labels [tokens] → losses [tokens], float32."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, shard, kernel):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses, gradients = _in_chunks(
            hidden, weight, labels, shard, kernel, input_gradient=needs_hidden and not needs_weight, keep=needs_weight
        )
        ctx.weight_trains, ctx.shard = needs_weight, shard
        if needs_weight:
            ctx.save_for_backward(hidden, weight, gradients)
        else:
            ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx, loss_gradients):
        if not ctx.weight_trains:
            (hidden_gradient,) = ctx.saved_tensors
            return (hidden_gradient * loss_gradients[:, None]).to(hidden_gradient.dtype), None, None, None, None
        hidden, weight, gradients = ctx.saved_tensors
        gradients.mul_(loss_gradients[:, None])
        entries = ctx.shard.num_entries
        hidden_gradient = gradients.mm(weight[:entries]) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.empty_like(weight)
        torch.mm(gradients.t(), hidden, out=weight_gradient[:entries])
        weight_gradient[entries:] = 0
        return hidden_gradient, weight_gradient, None, None, None


def _in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    shard: VocabShard,
    kernel: Kernel,
    *,
    input_gradient: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return losses and a gradient: with `keep` that of the logits, with `input_gradient` that of `hidden`, or None."""
    tokens, weight = hidden.shape[0], weight[: shard.num_entries]
    chunk_tokens = _CHUNK_TOKENS.get(hidden.device.type, _CHUNK_TOKENS["cuda"])
    logits = hidden.new_empty(tokens if keep else min(chunk_tokens, tokens), shard.num_entries)
    hidden_gradient = torch.empty_like(hidden) if input_gradient else None
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    for start in range(0, tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, tokens))
        its_logits = logits[chunk] if keep else logits[: chunk.stop - chunk.start]
        torch.mm(hidden[chunk], weight.t(), out=its_logits)
        losses[chunk] = kernel(its_logits, labels[chunk], shard)
        if hidden_gradient is not None:
            torch.mm(its_logits, weight, out=hidden_gradient[chunk])
    return losses, logits if keep else hidden_gradient


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    shard: VocabShard,
    *,
    kernel: Kernel = torch_kernel,
) -> torch.Tensor:
    """hidden [tokens, h], weight [rows, h], labels [tokens] → loss of every token, [tokens], float32.

    The gradient of `hidden` is this rank's part, and the caller sums it over `shard.group`. No gradients are computed
    under `no_grad`, or if neither `hidden` nor `weight` requires them.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, shard, kernel)
    return _in_chunks(hidden, weight, labels, shard, kernel, input_gradient=False, keep=False)[0]


class OutputLayer(ColumnParallelLinear):
    """megatron.core's output layer, which also computes the loss if it gets labels. It becomes the layer's class.

    The loss is part of the layer's call, not a separate function: DDP's hooks (`overlap_param_gather`) need the call.
    """

    vocab_size: int
    """Without padding."""
    kernel: Kernel

    def forward(self, input_, weight=None, runtime_gather_output=None, labels=None):
        """input_ [s, b, h] (with sequence parallelism this rank's part of s) → logits [s, b, rows] and no bias; with
        labels [b, s] → the loss of every token, [b, s]."""
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        sequence, batch, width = hidden.shape
        losses = linear_cross_entropy(
            hidden.reshape(-1, width),
            weight,
            labels.t().reshape(-1),
            VocabShard.of_rank(weight.shape[0], vocab_size=self.vocab_size, group=self.tp_group),
            kernel=self.kernel,
        )
        return losses.view(sequence, batch).t().contiguous()


def give_loss(layer: ColumnParallelLinear, *, vocab_size: int, cross_entropy: CrossEntropy) -> None:
    """Make megatron.core's output layer compute the loss itself.

    Raises:
        ConfigError: Liger is requested but not usable.
    """
    if cross_entropy == "liger":
        _check_liger(layer.tp_group.size())
    ours = become(layer, OutputLayer)
    ours.vocab_size, ours.kernel = vocab_size, _KERNELS[cross_entropy]


def _check_liger(tensor_size: int) -> None:
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "model.cross_entropy is liger, which needs a CUDA device and the liger-kernel package: install it, or set "
            "model.cross_entropy to chunked"
        )
    if tensor_size > 1:
        raise ConfigError(
            f"model.cross_entropy is liger, which needs the whole vocabulary on every rank, but "
            f"parallel.tensor_model_parallel_size is {tensor_size}: set model.cross_entropy to chunked"
        )
