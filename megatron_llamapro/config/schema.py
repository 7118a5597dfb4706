"""The configuration of a pretraining run: frozen, typed data. Field names are megatron.core's and Megatron-LM's.

One YAML file holds a `RunConfig`. Every field can be overridden on the command line by its dotted name, for example
`--parallel.tensor_model_parallel_size 2`. Attribute docstrings are the help text; the first line of a class docstring
is the title of its section. `checks.py` rejects invalid values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_llamapro.config.fields import FilePath

Precision = Literal["bf16", "fp32"]
LRDecayStyle = Literal["cosine", "linear", "constant"]
RecomputeGranularity = Literal["full", "selective"]
RecomputeMethod = Literal["uniform", "block"]
RecomputeModule = Literal["core_attn", "mlp", "moe"]
PenaltyOn = Literal["all", "known"]
TransformerImpl = Literal["auto", "local", "transformer_engine"]
DataFormat = Literal["text", "chat"]
CrossEntropy = Literal["chunked", "liger", "plain"]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LoraBlocks = Literal["originals", "added_blocks", "all"]


@dataclass(frozen=True)
class ModelConfig:
    """The model and its trainable part."""

    checkpoint: FilePath
    """Megatron checkpoint folder to start from, written by llamapro convert. Its llamapro.json says which blocks were
    added, and its config.json describes the model's shape."""
    trainable: tuple[str, ...] = ("added_blocks",)
    """The parts of the model to train: added_blocks (of all rounds), newest_blocks (of the latest round), round_1,
    round_2, …, embedding, final_norm, output_layer, everything, or lora (the adapters of the section lora). Parts of
    all added blocks: linear_qkv, linear_proj, linear_fc1, linear_fc2, input_layernorm, pre_mlp_layernorm, and if the
    model has them, q_layernorm, k_layernorm, router, experts."""
    transformer_impl: TransformerImpl = "auto"
    """Implementation of the layers. auto: Transformer Engine's if it is installed and there is a GPU, else local."""
    cross_entropy: CrossEntropy = "chunked"
    """How to compute the loss. chunked: output layer and cross-entropy together, some tokens at a time, so the whole
    logits are never in memory. liger: the same, by a kernel of the liger-kernel package; needs a GPU and no tensor
    parallelism. plain: megatron.core's, with whole logits and their softmax in float32."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times tensor_model_parallel_size. Padding never has loss."""


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism over ranks. The optimizer state is always sharded over the data-parallel ranks.

    (megatron.core's distributed optimizer.)"""

    tensor_model_parallel_size: int = 1
    """Number of ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages. Each holds some of the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Number of layer chunks per stage, for the interleaved schedule."""
    pipeline_stage_layers: tuple[int, ...] | None = None
    """Number of layers on each stage, first to last (with virtual stages: chunk 0 of every stage, then chunk 1, …). If
    unset, layers are spread as evenly as possible."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass."""
    distributed_timeout_minutes: float = 10.0
    """Minutes that a collective waits for a missing rank."""


@dataclass(frozen=True)
class RecomputeConfig:
    """Activations to recompute in the backward pass instead of keeping them: less memory, more work.

    Layers below the first trainable one keep no activations and are never recomputed. (megatron.core's recompute_….)"""

    granularity: RecomputeGranularity | None = None
    """full: recompute whole layers. selective: only the parts named in modules. If unset, nothing is recomputed."""
    method: RecomputeMethod | None = None
    """For full. uniform: all layers, in groups of num_layers; only each group's input is kept. block: the first
    num_layers of every (virtual) stage, one by one. Both count from the first trainable layer."""
    num_layers: int | None = None
    """For full: see method."""
    modules: tuple[RecomputeModule, ...] = ()
    """For selective: core_attn, mlp, or moe (the layer of experts)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), a baseline: a weight W becomes W + alpha / rank * B A.

    The adapters train if model.trainable names lora."""

    rank: int | None = None
    """Number of rows of A and of columns of B. If unset, there are no adapters.
    They train if model.trainable names lora."""
    alpha: float | None = None
    """Numerator of the factor alpha / rank. If unset, it equals rank, so the factor is 1."""
    targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Linear layers that get an adapter. linear_qkv is queries, keys and values; linear_fc1 is gate and up."""
    blocks: LoraBlocks = "originals"
    """Blocks that get adapters: originals (usual LoRA), added_blocks (which makes these low-rank), or all."""

    @property
    def scaling(self) -> float:
        """The factor before B A."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True)
class ParamGroupRule:
    """Settings for the parameters that match a pattern."""

    match: str
    """Pattern (shell style, e.g. '*.linear_fc2.weight') for global parameter names such as
    decoder.layers.39.mlp.linear_fc2.weight. A pattern that matches no trainable parameter is an error."""
    lr_mult: float = 1.0
    """Factor on the learning rate."""
    wd_mult: float | None = None
    """Factor on weight_decay; 0 turns it off. If unset: 0 for norms and biases, else 1."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. The defaults are the paper's."""

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: LRDecayStyle = "cosine"
    """Shape of the learning rate after warm-up."""
    lr_warmup_fraction: float = 0.06
    """Fraction of train_iters over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW. Norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    adam_eps: float = 1e-8
    """Epsilon in AdamW's denominator."""
    clip_grad: float = 1.0
    """Clip gradients to this global norm over all trainable parameters. 0 turns clipping off."""
    param_groups: tuple[ParamGroupRule, ...] = ()
    """Rules for single parameters. The first that matches a parameter applies."""


@dataclass(frozen=True)
class BlendEntry:
    """One source of training data."""

    prefix: FilePath
    """Path of a .bin/.idx pair without the suffix. llamapro preprocess or Megatron-LM writes such pairs."""
    weight: float = 1.0
    """Share of the samples from this source, relative to the other weights."""
    known: bool = False
    """Whether the original model knows such text already, so that the section keep treats it as text to keep."""


@dataclass(frozen=True)
class DataConfig:
    """Training data and held-out data."""

    train: tuple[BlendEntry, ...]
    """Sources of the training data, blended by weight."""
    seq_length: int
    """Number of tokens per sample."""
    format: DataFormat = "text"
    """text: documents end to end, cut into samples, with loss on every token. chat: whole conversations (llamapro
    preprocess --chat), with loss only on the assistant's words. Conversations longer than a sample are left out."""
    packing: bool = False
    """For chat. Pack as many conversations into a sample as fit. Later ones see earlier ones, as documents do in text
    data. If false, a sample is one conversation and padding."""
    valid: dict[str, FilePath] = field(default_factory=dict)
    """Held-out sets: name -> prefix. Each is evaluated and reported under its name."""
    tokenizer: FilePath | None = None
    """tokenizer.json, tokenizer.model, or a folder with one of them. If unset, the checkpoint's own."""
    cache_dir: FilePath | None = None
    """Folder for index files, on a file system that all ranks share. If unset, .cache beside the metrics file."""
    train_samples: int | None = None
    """Number of samples in the data's order, which depends on it. Set it if the run may be extended later. If unset,
    train_iters * global_batch_size."""
    eod_mask_loss: bool = False
    """Mask the loss of inputs that are the end-of-document token."""
    num_workers: int = 0
    """Number of processes that load data. 0 loads in the training process, which is faster for token files."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, batch size, precision and evaluation."""

    train_iters: int
    """Number of optimizer steps of the whole run."""
    micro_batch_size: int
    """Number of samples per forward pass."""
    global_batch_size: int
    """Number of samples per optimizer step, over all data-parallel ranks."""
    precision: Precision = "bf16"
    """Precision of weights and activations. The checkpoint must have been converted to it."""
    seed: int = 1234
    """Random seed of the data's order and of the model."""
    eval_interval: int = 0
    """Steps between evaluations of the held-out sets. They are also evaluated before the first and after the last step.
    0: never."""
    eval_samples: int = 64
    """Number of samples that an evaluation reads from each held-out set, evenly spaced; all if the set has fewer."""
    exit_interval: int | None = None
    """Save and stop at the next step that is a multiple of this."""
    max_skipped_steps: int = 10
    """Number of skipped steps in a row after which the run ends (exit code 65). A step is skipped (updates nothing) if
    its loss or gradient norm is not finite, or its gradient is exactly 0. A bad document causes one or two; a diverged
    model skips every step."""
    skip_iterations: tuple[int | str, ...] = ()
    """Steps to leave out because their data are known to be bad, e.g. [700, 1200-1215]. Their data count as consumed
    but are not read. All other steps keep their data and their learning rate."""
    hang_timeout_minutes: float = 8.0
    """End the run if no step ends for this long. Every rank prints its stack, and one line names the rank that the
    others wait for. 0: never. A shorter parallel.distributed_timeout_minutes ends the run without naming a rank."""


@dataclass(frozen=True)
class KeepConfig:
    """Keeping what the original model knew. docs/keeping.md says what helps."""

    penalty_weight: float = 0.0
    """Weight of a penalty on what the added blocks add: the squared size of a block's contribution to the residual
    stream relative to the stream, mean over tokens and blocks. It is added to the loss. 0: none."""
    penalty_on: PenaltyOn = "all"
    """Tokens that the penalty is computed on. all: every token that has a loss. known: only those from sources of
    data.train marked known. The sum over them is still divided by the number of all tokens, so the share of these
    sources is part of the weight."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: where, how often, and how many to keep."""

    save: FilePath | None = None
    """Folder for checkpoints (iter_0000100, …). If it already holds one, the run resumes from it."""
    save_interval: int = 0
    """Steps between checkpoints. 0: only at the end. One is always written at the end."""
    delta: bool = True
    """Write only the trainable part to each checkpoint, and the frozen part once, to the folder base beside them. If
    everything trains, checkpoints are full."""
    async_save: bool = False
    """Continue training while a checkpoint is written. It counts as saved when it is complete. Needs memory for a copy
    of the checkpoint."""
    keep_last: int | None = None
    """Number of newest checkpoints to keep. If unset, all are kept."""
    keep_every: int | None = None
    """Also keep checkpoints whose step is a multiple of this, although keep_last would remove them."""


@dataclass(frozen=True)
class LoggingConfig:
    """Log lines, metrics and trackers."""

    log_interval: int = 1
    """Steps between log lines."""
    diagnostics_interval: int = 0
    """Steps between diagnostics of every added block: its contribution to the residual stream, its gradient norm, and
    its distance from the block it was copied from. 0: never. One replica needs host memory the size of all added
    blocks."""
    metrics_file: FilePath | None = None
    """JSONL record of every logged step and evaluation. If unset, metrics.jsonl in checkpoint.save, or in the working
    directory. The file of another run is moved aside, to metrics.1.jsonl."""
    tensorboard_dir: FilePath | None = None
    """TensorBoard folder. Needs the tensorboard package."""
    wandb_project: str | None = None
    """Weights & Biases project. Needs the wandb package. Sends the metrics to its server, or with WANDB_MODE=offline
    stores them for later. All starts of a run continue the same wandb run."""
    wandb_name: str | None = None
    """Name of the wandb run. If unset, the name of the metrics file's folder."""


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a whole run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def data_order_samples(self) -> int:
        """The number of samples in the data's order."""
        return self.data.train_samples or self.training.train_iters * self.training.global_batch_size
