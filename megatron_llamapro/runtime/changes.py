"""The changes that this package makes to megatron.core: one row per place, with the reason and when it can go.

`tests/runtime/test_changes.py` checks that the table is complete, and that upstream's code is still what each row was
written against. docs/changes_to_megatron.md shows it. (`runtime/cpu.py` and `runtime/upstream.py` list devices and
warnings.) Nothing is imported: a row names everything by its dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

VERSION = "0.16.1"
"""The version that all rows were checked against. "main" below is Megatron-LM's of 22 August 2026, after 0.19."""


class How(Enum):
    """How upstream's code is changed. The value is an explanation for readers."""

    CLASS = "an object that upstream built takes our class (`become`)"
    SUBCLASS = "upstream is given an object of our subclass"
    ATTRIBUTE = "an attribute of a module or of an object is set"
    INSTEAD = "our function does or repeats what upstream's does"


@dataclass(frozen=True)
class Change:
    """One place in megatron.core, and what replaces it."""

    ours: str
    """Class or function, within this package."""
    upstream: str
    """Class or module of megatron.core."""
    replaces: Mapping[str, str]
    """Its members that are replaced or whose behaviour changes, each with a fingerprint of its source."""
    how: How
    why: str
    until: str
    """When the row can go, or why it stays."""


_MODEL = (
    Change(
        ours="model.skip_frozen.FrozenAwareBlock",
        upstream="megatron.core.transformer.transformer_block.TransformerBlock",
        replaces={"_checkpointed_forward": "60ffb595"},
        how=How.CLASS,
        why="Full recomputation gives layers no gradient if no input of their checkpoint requires grad. It computes "
        "frozen layers again, and fails if recompute_num_layers does not divide the number of layers.",
        until="Stays: main loses these gradients too. From 0.18 on, any recompute_num_layers works, and the method is "
        "the function megatron.core.recompute.checkpointed_forward (#4496), so the override must move.",
    ),
    Change(
        ours="model.skip_frozen.skip_frozen_work",
        upstream="megatron.core.models.gpt.gpt_model.GPTModel",
        replaces={"set_input_tensor": "ec5d0a26"},
        how=How.ATTRIBUTE,
        why="A received tensor always requires grad, so a frozen stage would keep activations and run backward passes.",
        until="Stays: received tensors require grad in main too.",
    ),
    Change(
        ours="model.skip_frozen.skip_frozen_work",
        upstream="megatron.core.models.common.embeddings.language_model_embedding.LanguageModelEmbedding",
        replaces={"forward": "f1233761"},
        how=How.ATTRIBUTE,
        why="A frozen embedding runs without autograd.",
        until="Stays with the next row.",
    ),
    Change(
        ours="model.skip_frozen.skip_frozen_work",
        upstream="megatron.core.transformer.transformer_layer.TransformerLayer",
        replaces={"forward": "a858d1d1"},
        how=How.ATTRIBUTE,
        why="Layers below the first trainable one run without autograd. With selective recomputation, the "
        "input of the first trainable layer is made to require grad; otherwise the checkpoint inside the layer gives "
        "it no gradient.",
        until="Stays: upstream has forward-only layers only if multi-token prediction trains alone (#7021).",
    ),
    Change(
        ours="model.penalty.penalise_added_blocks",
        upstream="megatron.core.transformer.transformer_layer.TransformerLayer",
        replaces={"forward": "a858d1d1"},
        how=How.ATTRIBUTE,
        why="Only with a penalty on added blocks: the backward pass of their layers adds its gradient. The weights of "
        "the tokens reach them as context_mask, which nothing else uses in a model without cross-attention.",
        until="Stays.",
    ),
    Change(
        ours="model.attention.RotaryTables",
        upstream="megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding",
        replaces={"forward": "a95f1a08"},
        how=How.CLASS,
        why="Cosines and sines are computed once per sequence length. Upstream computes them from the angles in every "
        "layer.",
        until="Stays while LlamaSelfAttention does.",
    ),
    Change(
        ours="model.build._build_chunk",
        upstream="megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding",
        replaces={"__init__": "715116ec", "_apply_scaling": "d0a18429"},
        how=How.ATTRIBUTE,
        why="inv_freq is set to the frequencies that transformers computes, for every kind of scaling that families "
        "use. Upstream has only Llama 3's scaling, with most of its factors fixed.",
        until="Stays.",
    ),
    Change(
        ours="model.build._mark_tensor_parallel",
        upstream="megatron.core.tensor_parallel.layers",
        replaces={"_initialize_affine_weight_cpu": "581e6c26", "_initialize_affine_weight_gpu": "4737fbfe"},
        how=How.INSTEAD,
        why="With perform_initialization=False, no code marks the weights that are sharded over tensor-parallel ranks, "
        "and the gradient norm is too small.",
        until="0.18, which always marks them (#4084).",
    ),
    Change(
        ours="model.build.LlamaModel",
        upstream="megatron.core.models.gpt.gpt_model.GPTModel",
        replaces={"_postprocess": "a5f7de0b", "compute_language_model_loss": "86cf8e89"},
        how=How.SUBCLASS,
        why="The output layer computes the loss, and padding entries of the vocabulary get no probability.",
        until="Stays: in main, padding entries have a probability.",
    ),
    Change(
        ours="model.attention.LlamaSelfAttention",
        upstream="megatron.core.transformer.attention.SelfAttention",
        replaces={"forward": "0e779c3e"},
        how=How.SUBCLASS,
        why="Queries and keys are rotated in place and reach torch's attention without a copy.",
        until="Stays: speed without Transformer Engine, whose layers are used as they are.",
    ),
    Change(
        ours="model.lora.LoraColumnParallelLinear",
        upstream="megatron.core.tensor_parallel.layers.ColumnParallelLinear",
        replaces={"forward": "3f9d98f2", "sharded_state_dict": "c79188ac"},
        how=How.CLASS,
        why="Low-rank adapters.",
        until="Stays: megatron.core has no adapters.",
    ),
    Change(
        ours="model.lora.LoraRowParallelLinear",
        upstream="megatron.core.tensor_parallel.layers.RowParallelLinear",
        replaces={"forward": "2148db98", "sharded_state_dict": "dcd7772d"},
        how=How.CLASS,
        why="Low-rank adapters.",
        until="Stays: megatron.core has no adapters.",
    ),
    Change(
        ours="model.loss.OutputLayer",
        upstream="megatron.core.tensor_parallel.layers.ColumnParallelLinear",
        replaces={"forward": "3f9d98f2"},
        how=How.CLASS,
        why="The loss is computed in chunks of tokens, so the logits of all tokens are never held in float32.",
        until="Stays: main computes all logits first.",
    ),
)

_OPTIMIZER = (
    Change(
        ours="optimizer.torch_adam.ResumableDistributedOptimizer",
        upstream="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        replaces={"get_parameter_state_dp_zero": "812c52ea"},
        how=How.CLASS,
        why="Upstream saves the state of parameters after a padded bucket at shifted positions: it leaves out "
        "the padding in this method, but counts it when it cuts the result into parameters.",
        until="The first release with #5077 (in main, not in 0.19). It must go then: both fixes together shift again.",
    ),
    Change(
        ours="optimizer.torch_adam.TorchAdamDistributedOptimizer",
        upstream="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        replaces={
            "state_dict": "fe621ae6",
            "load_state_dict": "15f257b4",
            "_set_main_param_and_optimizer_states": "93c25422",
        },
        how=How.CLASS,
        why="torch's AdamW keeps a step per parameter. Upstream fails on a rank that trains nothing, shares one step "
        "tensor after loading, and looks for steps among the saved moments.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="optimizer.replicas.BucketGroupOfOne",
        upstream="megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup",
        replaces={"start_grad_sync": "d8391c53", "start_param_sync": "ec6000db"},
        how=How.CLASS,
        why="Collectives of a single rank are skipped; gloo would copy all gradients and parameters for them.",
        until="Stays: main skips only a gather of its layer-wise optimizer. From 0.17 on, start_grad_sync also "
        "copies gradients that are accumulated in a higher precision.",
    ),
    Change(
        ours="optimizer.update.update",
        upstream="megatron.core.optimizer.optimizer.ChainedOptimizer",
        replaces={"step": "7f8c72f2"},
        how=How.INSTEAD,
        why="The gradient norm is computed before anything is updated, so that a bad step updates nothing.",
        until="Stays: main's step also does both at once. From 0.19 on, groups of parameters may have their own norms.",
    ),
)

_TRAINING = (
    Change(
        ours="training.communication.FrozenAwareCommunicator",
        upstream="megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator",
        replaces={"_communicate": "a902480c"},
        how=How.SUBCLASS,
        why="A stage awaits no gradient if the next stage computes none.",
        until="Stays: main awaits a gradient for every activation.",
    ),
    Change(
        ours="training.communication.backward_order",
        upstream="megatron.core.pipeline_parallel.schedules",
        replaces={
            "forward_backward_pipelining_with_interleaving": "bd107360",
            "forward_backward_pipelining_without_interleaving": "ecf7d693",
        },
        how=How.INSTEAD,
        why="FrozenAwareCommunicator needs the order in which the schedules await gradients; another order would hang.",
        until="Stays while FrozenAwareCommunicator does.",
    ),
    Change(
        ours="training.checkpoints.torch_dist_save.plan_writing",
        upstream="megatron.core.dist_checkpointing.serialization",
        replaces={"save": "977482f0"},
        how=How.INSTEAD,
        why="In upstream, an error of one rank leaves the others waiting in their next collective.",
        until="Stays: main exchanges no errors either. From 0.19 on, the common state is saved with the tensors and "
        "not in common.pt.",
    ),
    Change(
        ours="training.checkpoints.torch_dist_save.plan_writing",
        upstream="megatron.core.dist_checkpointing.strategies.filesystem_async",
        replaces={"_get_write_results_queue": "349269cb"},
        how=How.ATTRIBUTE,
        why="_results_queue is set before upstream sets it. Upstream would spawn a manager process for it, which "
        "takes seconds and imports the main script again.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="training.checkpoints.torch_dist_save._Strategy",
        upstream="megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy",
        replaces={"_get_save_and_finalize_callbacks": "098f6acc"},
        how=How.SUBCLASS,
        why="Each rank writes its file with `_write`, and then all ranks exchange errors.",
        until="Stays while plan_writing does.",
    ),
    Change(
        ours="training.checkpoints.torch_dist_save._write",
        upstream="megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync",
        replaces={"write_preloaded_data_multiproc": "bef05e8d"},
        how=How.INSTEAD,
        why="Upstream starts a process per file, and waits forever for one that was killed.",
        until="0.17, which writes with threads (#3633), if its function survives a full disk and a killed writer.",
    ),
)

_DATA = (
    Change(
        ours="data.dataset._Alone",
        upstream="megatron.core.datasets.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder",
        replaces={"build_generic_dataset": "07e19652", "_build_megatron_datasets_parallel": "3abb6c29"},
        how=How.SUBCLASS,
        why="Rank 0 builds the index files without an inner barrier, so that all ranks can be told of its error.",
        until="Stays: main also has the inner barrier.",
    ),
    Change(
        ours="data.conversations.ConversationDataset",
        upstream="megatron.core.datasets.megatron_dataset.MegatronDataset",
        replaces={
            "_key_config_attributes": "9d488d88",
            "build_low_level_dataset": "e59edd8a",
            "numel_low_level_dataset": "59da6375",
        },
        how=How.SUBCLASS,
        why="Samples are conversations, packed or not; the cache's key says which.",
        until="Stays: upstream intends these methods to be overridden.",
    ),
)

_PROCESS = (
    Change(
        ours="runtime.upstream.import_megatron",
        upstream="megatron.core.transformer.moe.moe_utils",
        replaces={"RouterGatingLinearFunction": "a34180b7"},
        how=How.ATTRIBUTE,
        why="te_general_gemm is set to None: without Transformer Engine the name does not exist, and routers fail.",
        until="0.17, which sets it (#3763).",
    ),
    Change(
        ours="runtime.upstream.import_megatron",
        upstream="megatron.core.tensor_parallel.layers",
        replaces={"LinearWithGradAccumulationAndAsyncCommunication": "a2f6825a"},
        how=How.ATTRIBUTE,
        why="The environment variable CUDA_DEVICE_MAX_CONNECTIONS is set to 1 if it is not set: the overlap of "
        "collectives with matrix products relies on it.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="runtime.cpu._megatron_rows",
        upstream="megatron.core.tensor_parallel.random",
        replaces={"_get_cuda_rng_state": "aa26caaa", "_set_cuda_rng_state": "b179c9d9"},
        how=How.ATTRIBUTE,
        why="Without a GPU, the CPU's random generator replaces the GPU's.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="dry_run.fake_world._megatron_rows",
        upstream="megatron.core.distributed.param_and_grad_buffer",
        replaces={"_coalescing_manager": "torch"},
        how=How.ATTRIBUTE,
        why="In a dry run only: a coalesced reduce-scatter has no fake kernel.",
        until="Stays until torch's fake process group has one.",
    ),
    Change(
        ours="dry_run.fake_world._megatron_rows",
        upstream="megatron.core.tensor_parallel.random.CudaRNGStatesTracker",
        replaces={"fork": "6821e1e3"},
        how=How.ATTRIBUTE,
        why="In a dry run only: random states are data, and fake tensors have none.",
        until="Stays.",
    ),
    Change(
        ours="dry_run.fake_world.watched_messages",
        upstream="megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator",
        replaces={"_communicate": "a902480c"},
        how=How.ATTRIBUTE,
        why="In a dry run only: messages between stages are counted.",
        until="Stays.",
    ),
)

CHANGES = (*_MODEL, *_OPTIMIZER, *_TRAINING, *_DATA, *_PROCESS)
