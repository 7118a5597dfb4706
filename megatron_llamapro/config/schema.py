"""The configuration of a pretraining run: frozen, typed data. Field names are megatron.core's and Megatron-LM's.

One YAML file holds a `RunConfig`; every field can be overridden on the command line with its dotted name, e.g.
`--parallel.tensor_model_parallel_size 2`. Attribute docstrings are the help text. `checks.py` says what cannot be.
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
TransformerImpl = Literal["auto", "local", "transformer_engine"]
DataFormat = Literal["text", "chat"]
CrossEntropy = Literal["chunked", "liger", "plain"]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LoraBlocks = Literal["originals", "added_blocks", "all"]


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    checkpoint: FilePath
    """Megatron checkpoint folder to start from, written by llamapro convert. Its llamapro.json says which blocks
    were added, its config.json the model's shape."""
    trainable: tuple[str, ...] = ("added_blocks",)
    """What trains: added_blocks (of all rounds), newest_blocks (of the latest), round_1, round_2, …, embedding,
    final_norm, output_layer, everything, lora (the adapters of the section lora), or parts of all added blocks:
    linear_qkv, linear_proj, linear_fc1, linear_fc2, input_layernorm, pre_mlp_layernorm, and where the model has them
    q_layernorm, k_layernorm, router, experts."""
    transformer_impl: TransformerImpl = "auto"
    """auto takes Transformer Engine's layers where it is installed and a GPU is there, else local."""
    cross_entropy: CrossEntropy = "chunked"
    """How the loss is computed. chunked: output layer and cross-entropy as one, some tokens at a time, so that the
    logits are never held whole. liger: the same with the liger-kernel package's kernel, on a GPU, without tensor
    parallelism. plain: megatron.core's, whole logits and their softmax in float32."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size; padding never gets loss."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and its optimizer state are divided over ranks. Optimizer state is always divided over the
    data-parallel ranks (megatron.core's distributed optimizer)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are laid on."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers a stage holds, for the interleaved schedule."""
    pipeline_stage_layers: tuple[int, ...] | None = None
    """Layers on each stage, first to last (with virtual stages: chunk 0 of every stage, then chunk 1, …). Without
    it they are spread as evenly as possible."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs."""
    distributed_timeout_minutes: float = 10.0
    """Minutes that a collective waits for a missing rank."""


@dataclass(frozen=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of being kept: less memory, more work.
    Layers below the first trainable one keep none and are never computed again. (megatron.core's recompute_….)"""

    granularity: RecomputeGranularity | None = None
    """full: whole layers; selective: the parts named in modules. Without it nothing is computed again."""
    method: RecomputeMethod | None = None
    """Of full. uniform: all layers, num_layers at a time, keeping each group's input; block: the first num_layers
    of every (virtual) stage, each by itself; both count from the first trainable layer."""
    num_layers: int | None = None
    """Of full: see method."""
    modules: tuple[RecomputeModule, ...] = ()
    """Of selective: core_attn, mlp, or moe (the layer of experts)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), a baseline: a linear's weight W becomes W + alpha / rank * B A. They
    train where model.trainable names lora."""

    rank: int | None = None
    """Rows of A and columns of B. Without it there are no adapters."""
    alpha: float | None = None
    """Without it the rank, which makes the factor alpha / rank 1."""
    targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Linears that get one; linear_qkv is queries, keys and values, linear_fc1 gate and up."""
    blocks: LoraBlocks = "originals"
    """Blocks that get them: originals (LoRA as it is known), added_blocks (these are then low-rank), or all."""

    @property
    def scaling(self) -> float:
        """The factor before B A."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True)
class ParamGroupRule:
    """Settings of the parameters that a pattern matches."""

    match: str
    """Pattern (shell style, e.g. '*.linear_fc2.weight') over global parameter names such as
    decoder.layers.39.mlp.linear_fc2.weight. A pattern that matches no trainable parameter is an error."""
    lr_mult: float = 1.0
    """Multiple of the learning rate."""
    wd_mult: float | None = None
    """Multiple of weight_decay; 0 turns it off. Without it: 1, and 0 for norms and biases."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the paper's."""

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: LRDecayStyle = "cosine"
    """Shape of the learning rate after warm-up."""
    lr_warmup_fraction: float = 0.06
    """Part of train_iters over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """AdamW's; norms and biases get none."""
    adam_beta1: float = 0.9
    """AdamW's."""
    adam_beta2: float = 0.95
    """AdamW's."""
    adam_eps: float = 1e-8
    """AdamW's."""
    clip_grad: float = 1.0
    """Largest global gradient norm over all trainable parameters; 0 turns clipping off."""
    param_groups: tuple[ParamGroupRule, ...] = ()
    """Rules for single parameters; the first that matches applies."""


@dataclass(frozen=True)
class BlendEntry:
    """One source of training data."""

    prefix: FilePath
    """Path of a .bin/.idx pair, without the ending, written by llamapro preprocess or Megatron-LM."""
    weight: float = 1.0
    """Share of the samples that come from it, relative to the other weights."""


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    train: tuple[BlendEntry, ...]
    """What is trained on."""
    seq_length: int
    """Tokens a sample."""
    format: DataFormat = "text"
    """text: documents one behind the other, cut into samples, with loss everywhere. chat: whole conversations
    (llamapro preprocess --chat), with loss on what the assistant says; those longer than a sample are left out."""
    packing: bool = False
    """Of chat. Lay several conversations into a sample, where they fit; later ones see earlier ones, as documents of
    text do. Without it a sample is one conversation and padding."""
    valid: dict[str, FilePath] = field(default_factory=dict)
    """Held-out sets: name -> prefix. Each is evaluated and reported under its name."""
    tokenizer: FilePath | None = None
    """tokenizer.json, tokenizer.model, or a folder that holds one; without it, the checkpoint's own."""
    cache_dir: FilePath | None = None
    """Folder for index files, on a filesystem that all ranks share; without it, .cache beside the metrics file."""
    train_samples: int | None = None
    """Samples the order of the data is made for; without it, train_iters * global_batch_size. Fix it when a run
    may be prolonged: the order of the data depends on it."""
    eod_mask_loss: bool = False
    """Give no loss where the input is the end-of-document token."""
    num_workers: int = 0
    """Worker processes for loading; 0 loads in the training process, which is faster for token files."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at a time."""

    train_iters: int
    """Optimizer steps of the whole run."""
    micro_batch_size: int
    """Samples a forward pass."""
    global_batch_size: int
    """Samples an optimizer step, over all data-parallel ranks."""
    precision: Precision = "bf16"
    """Of weights and activations; the checkpoint must have been converted to it."""
    seed: int = 1234
    """Of data order and of anything random in the model."""
    eval_interval: int = 0
    """Steps between evaluations of the held-out sets; also before the first and after the last step. 0: never."""
    eval_samples: int = 64
    """Samples of each held-out set that an evaluation reads, evenly spaced; all where it has fewer."""
    exit_interval: int | None = None
    """Save and stop when the step is a multiple of this."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient norm is not finite, or whose gradient is exactly 0, updates nothing. After so many
    in a row the run ends (exit code 65). A bad document makes one or two; a model that has diverged makes every one."""
    skip_iterations: tuple[int | str, ...] = ()
    """Steps to leave out because their data are known to be bad, e.g. [700, 1200-1215]. The data count as consumed and
    are not read; all other steps keep their data and their learning rate."""
    hang_timeout_minutes: float = 8.0
    """End the run when no step ends for so long, with the stack of every rank and the name of the one that the others
    wait for; 0: never. parallel.distributed_timeout_minutes, if it is shorter, ends it without saying who."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    save: FilePath | None = None
    """Folder for checkpoints (iter_0000100, …). A run whose folder already holds one continues from it."""
    save_interval: int = 0
    """Steps between checkpoints; one is always written at the end. 0: only at the end."""
    delta: bool = True
    """Keep what does not train once, in the folder base beside the checkpoints, and write only what trains. Full
    checkpoints are written where everything trains."""
    async_save: bool = False
    """Go on training while a checkpoint is written; it counts as saved when it is complete. Needs the memory of a
    copy of what is written."""
    keep_last: int | None = None
    """Newest checkpoints that are kept; without it, all."""
    keep_every: int | None = None
    """Of those that keep_last would remove, keep the ones whose step is a multiple of this."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is told."""

    log_interval: int = 1
    """Steps between lines."""
    diagnostics_interval: int = 0
    """Steps between figures of every added block: its contribution to the residual stream, gradient norm, and distance
    from the block it was copied from. 0: never. Takes host memory as large as the added blocks, on one replica."""
    metrics_file: FilePath | None = None
    """JSONL record of every logged step and evaluation; without it, metrics.jsonl in checkpoint.save or here. One that
    another run left is moved aside, to metrics.1.jsonl."""
    tensorboard_dir: FilePath | None = None
    """TensorBoard folder (needs the tensorboard package)."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the wandb package; sends the metrics to its server, or keeps them for it with
    WANDB_MODE=offline). All starts of a run go on with the same run there."""
    wandb_name: str | None = None
    """Name of the run there; without it, that of the folder of the metrics file."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def data_order_samples(self) -> int:
        """Samples that the order of the data is made for."""
        return self.data.train_samples or self.training.train_iters * self.training.global_batch_size
