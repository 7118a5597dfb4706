"""Counts what a step executes, holds and sends, op by op as torch runs it. Exact on real and on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Kind(str, Enum):
    """The purpose of held bytes."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    """The buffers in which gradients are summed and reduced."""
    MASTER = "master weights"
    MOMENTS = "optimizer moments"
    ACTIVATIONS = "activations"
    """Made by a forward pass."""
    TEMPORARY = "temporary"
    """Made by a backward pass, including its recomputation, or by the update."""


class Product(str, Enum):
    """The purpose of executed FLOPs."""

    FORWARD = "forward"
    RECOMPUTED = "recomputed"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"
    ATTENTION_FORWARD = "attention forward"
    ATTENTION_RECOMPUTED = "attention recomputed"
    ATTENTION_BACKWARD = "attention backward"


# Names of fused attention ops on CUDA and on the CPU → FLOPs as a multiple of the forward pass.
_ATTENTION = {
    f"_scaled_dot_product_{kernel}{backward}": 2.0 if backward else 1.0
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    for backward in ("", "_backward")
}

# Names of collective ops → their names in a report. Messages between stages are counted elsewhere, by the caller that
# knows their content.
_COLLECTIVES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
}


@dataclass(frozen=True)
class HeldMemory:
    """One piece of memory."""

    num_bytes: int
    kind: Kind
    label: str
    """The op that made it, its shape and its type."""


@dataclass
class Counts:
    """The results of counting."""

    flops: Counter[Product] = field(default_factory=Counter)
    """A multiply-add is 2. Causal attention is counted once. Its backward pass counts as two forward passes, although
    fused kernels compute the scores once more."""
    sent_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By group and collective: bytes of the larger of a collective's two buffers, on this rank."""
    peak_bytes: int = 0
    peak_by_kind: Mapping[Kind, int] = field(default_factory=dict)
    peak_op: int = 0
    """Number of the op at which the peak was reached."""


class CountingMode(TorchDispatchMode):
    """Counts the ops that run inside it. Register existing memory with `hold`. After op number `snapshot_at`,
    `snapshot` lists everything that is held."""

    def __init__(self, *, group_names: Mapping[str, str] | None = None, snapshot_at: int | None = None) -> None:
        super().__init__()
        self.counts = Counts()
        self.group_names = group_names or {}
        self.held: dict[int, HeldMemory] = {}
        self.by_kind: Counter[Kind] = Counter()
        self.weights: dict[int, torch.Size] = {}
        self.num_ops, self.snapshot_at = 0, snapshot_at
        self.updating = False
        self.snapshot: list[HeldMemory] = []

    def hold(self, tensors: Iterable[torch.Tensor], kind: Kind) -> None:
        """Register memory that already exists."""
        for tensor in tensors:
            self._hold(tensor, kind, "")

    def begin_update(self) -> None:
        """Count all memory made from now on as the update's. Call this when all gradients exist."""
        self.updating = True

    def know_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Register weights: products with them count as forward or input gradient, all others as weight gradient."""
        for parameter in parameters:
            if parameter.dim() == 2:
                self.weights[_address(parameter)] = parameter.shape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_ops += 1
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self._count_collective(name, args)
        elif name in _ATTENTION:
            self._count_attention(name, args, kwargs or {})
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.counts.flops[self._product(args)] += flops
        self._note_memory(f"{func.namespace}.{name}", result)
        return result

    def _product(self, args: tuple) -> Product:
        """Return the purpose of a product. A linear's weight is stored [out, in]: the forward pass multiplies by its
        transpose, the input gradient by the weight itself, and the weight gradient by neither."""
        for tensor in tree_leaves(args):
            shape = self.weights.get(_address(tensor)) if isinstance(tensor, torch.Tensor) else None
            if shape is not None:
                if not _is_transposed(tensor):
                    return Product.INPUT_GRADIENT
                return Product.RECOMPUTED if _in_backward() else Product.FORWARD
        return Product.WEIGHT_GRADIENT

    def _count_attention(self, name: str, args: tuple, kwargs: dict) -> None:
        factor = _ATTENTION[name]
        query, key = args[1:3] if factor == 2.0 else args[:2]
        batch, heads, queries, width = query.shape
        causal = kwargs.get("is_causal", any(argument is True for argument in args))
        flops = 4.0 * batch * heads * queries * key.shape[2] * width * factor / (2 if causal else 1)
        product = Product.ATTENTION_FORWARD
        if factor == 2.0:
            product = Product.ATTENTION_BACKWARD
        elif _in_backward():
            product = Product.ATTENTION_RECOMPUTED
        self.counts.flops[product] += int(flops)

    def _count_collective(self, name: str, args: tuple) -> None:
        if name not in _COLLECTIVES:
            return
        sizes = [sum(tensor.nbytes for tensor in tree_leaves(arg) if isinstance(tensor, torch.Tensor)) for arg in args]
        group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        if group.size() > 1:
            called = self.group_names.get(group.group_name, group.group_name)
            self.counts.sent_bytes[called, _COLLECTIVES[name]] += max(sizes)

    def _note_memory(self, op: str, result: Any) -> None:
        kind = Kind.TEMPORARY if self.updating or _in_backward() else Kind.ACTIVATIONS
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, kind, op)
        total = self.by_kind.total()
        if total > self.counts.peak_bytes:
            self.counts.peak_bytes, self.counts.peak_by_kind = total, dict(self.by_kind)
            self.counts.peak_op = self.num_ops
        if self.num_ops == self.snapshot_at:
            self.snapshot = sorted(self.held.values(), key=lambda held: -held.num_bytes)

    def _hold(self, tensor: torch.Tensor, kind: Kind, op: str) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address in self.held or not storage.nbytes():
            return
        label = f"{op} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        self.held[address] = HeldMemory(storage.nbytes(), kind, label.strip())
        self.by_kind[kind] += storage.nbytes()
        weakref.finalize(storage, self._release, address)

    def _release(self, address: int) -> None:
        freed = self.held.pop(address)
        self.by_kind[freed.kind] -= freed.num_bytes

    def largest(self) -> Iterator[tuple[int, int, HeldMemory]]:
        """Yield the snapshot's pieces, equal ones grouped: their number, their total bytes, one of them."""
        alike = Counter(self.snapshot)
        for held, number in sorted(alike.items(), key=lambda item: -item[0].num_bytes * item[1]):
            yield number, number * held.num_bytes, held


class SavedActivations:
    """Counts the bytes that autograd keeps for the backward pass while `hooks` are on. Each piece of memory counts
    once; weights and recomputed tensors do not count."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.num_bytes = 0
        self._known = {_address(parameter) for parameter in parameters}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address, storage = _address(tensor), tensor.untyped_storage()
        if address not in self._known and not _in_backward():
            self.num_bytes += storage.nbytes()
            self._known.add(address)
            weakref.finalize(storage, self._known.discard, address)
        return tensor


def _address(tensor: torch.Tensor) -> int:
    """Return an id of a tensor's memory. A fake tensor, which has no real memory, has one too."""
    return tensor.untyped_storage()._cdata


def _is_transposed(matrix: torch.Tensor) -> bool:
    """Return whether the last two dimensions of a stored [out, in] are swapped."""
    return matrix.stride(-2) < matrix.stride(-1)


def _in_backward() -> bool:
    """Return whether a backward pass is running. A forward product inside it is recomputation."""
    return torch._C._current_graph_task_id() != -1
