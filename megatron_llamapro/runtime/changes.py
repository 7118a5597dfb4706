"""What this package changes in megatron.core: one row a place, with the reason and when it can go.

`tests/runtime/test_changes.py` proves that the table is complete, and that upstream's code is still what each row was
written against. docs/changes_to_megatron.md shows it. (`runtime/cpu.py` and `runtime/upstream.py` list devices and
warnings.) Nothing is imported: a row names everything by its dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

VERSION = "0.16.1"
"""The megatron.core that all rows were checked against. "main" below is Megatron-LM's of 22 August 2026, after 0.19."""


class How(Enum):
    """How upstream's code is changed; the value is for readers."""

    CLASS = "an object that upstream built takes our class (`become`)"
    SUBCLASS = "upstream is given an object of our subclass"
    ATTRIBUTE = "an attribute of a module or of an object is set"
    INSTEAD = "our function does or repeats what upstream's does"


@dataclass(frozen=True)
class Change:
    """One place of megatron.core, and what stands there instead."""

    ours: str
    """Class or function, within this package."""
    upstream: str
    """Class or module of megatron.core."""
    replaces: Mapping[str, str]
    """Its members that are replaced, or whose behaviour is changed, and the fingerprint of the source of each."""
    how: How
    why: str
    until: str
    """When the row can go, or what keeps it."""


_MODEL = (
    Change(
        ours="model.skip_frozen.FrozenAwareBlock",
        upstream="megatron.core.transformer.transformer_block.TransformerBlock",
        replaces={"_checkpointed_forward": "60ffb595"},
        how=How.CLASS,
        why="Full recomputation gives no gradient to layers whose checkpoint has no input that requires grad, computes "
        "frozen layers again, and fails where recompute_num_layers does not divide the layers.",
        until="Stays: main loses these gradients too. From 0.18 on, any division works, and the method is a function, "
        "megatron.core.recompute.checkpointed_forward (#4496): the override must move.",
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
        why="Layers below the first trainable one run without autograd. With selective recomputation the input of the "
        "first trainable one is made to require grad; else the checkpoint inside it gives it no gradient.",
        until="Stays: upstream has forward-only layers only where multi-token prediction trains alone (#7021).",
    ),
    Change(
        ours="model.attention.RotaryTables",
        upstream="megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding",
        replaces={"forward": "a95f1a08"},
        how=How.CLASS,
        why="Cosines and sines are computed once a sequence length; upstream computes them from angles in every layer.",
        until="Stays while LlamaSelfAttention does.",
    ),
    Change(
        ours="model.build._build_chunk",
        upstream="megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding",
        replaces={"__init__": "715116ec", "_apply_scaling": "d0a18429"},
        how=How.ATTRIBUTE,
        why="inv_freq is set to the frequencies that transformers computes, for every kind of scaling that families "
        "have; upstream knows Llama 3's only, with most of its factors fixed.",
        until="Stays.",
    ),
    Change(
        ours="model.build._mark_tensor_parallel",
        upstream="megatron.core.tensor_parallel.layers",
        replaces={"_initialize_affine_weight_cpu": "581e6c26", "_initialize_affine_weight_gpu": "4737fbfe"},
        how=How.INSTEAD,
        why="With perform_initialization=False nobody marks which weights are divided over tensor-parallel ranks, and "
        "the gradient norm is too small.",
        until="0.18, which marks them in any case (#4084).",
    ),
    Change(
        ours="model.build.LlamaModel",
        upstream="megatron.core.models.gpt.gpt_model.GPTModel",
        replaces={"_postprocess": "a5f7de0b", "compute_language_model_loss": "86cf8e89"},
        how=How.SUBCLASS,
        why="The output layer computes the loss, and entries that pad the vocabulary get no probability.",
        until="Stays: in main padding entries have a probability.",
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
        why="The loss is computed chunk by chunk, without logits of all tokens in float32.",
        until="Stays: main computes all logits first.",
    ),
)

_OPTIMIZER = (
    Change(
        ours="optimizer.torch_adam.ResumableDistributedOptimizer",
        upstream="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        replaces={"get_parameter_state_dp_zero": "812c52ea"},
        how=How.CLASS,
        why="State of parameters behind a padded bucket is saved shifted: padding is left out here, and counted where "
        "the result is cut into parameters.",
        until="The first release with #5077 (in main, not in 0.19). It must go then: both together would shift again.",
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
        why="torch's AdamW has a step for each parameter: upstream fails on a rank that trains nothing, shares one "
        "step tensor after loading, and looks for steps among the saved moments.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="optimizer.replicas.BucketGroupOfOne",
        upstream="megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup",
        replaces={"start_grad_sync": "d8391c53", "start_param_sync": "ec6000db"},
        how=How.CLASS,
        why="Collectives of one rank are left out; gloo answers them with copies of all gradients and parameters.",
        until="Stays: main leaves out only a gather of its layer-wise optimizer. From 0.17 on, start_grad_sync also "
        "copies gradients that are accumulated in a higher precision.",
    ),
    Change(
        ours="optimizer.replicas.update",
        upstream="megatron.core.optimizer.optimizer.ChainedOptimizer",
        replaces={"step": "7f8c72f2"},
        how=How.INSTEAD,
        why="The gradient norm is known before anything is updated, so that a bad step updates nothing.",
        until="Stays: main's step also does both at once. From 0.19 on, groups of parameters may have their own norms.",
    ),
)

_TRAINING = (
    Change(
        ours="training.communication.FrozenAwareCommunicator",
        upstream="megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator",
        replaces={"_communicate": "a902480c"},
        how=How.SUBCLASS,
        why="A stage awaits no gradient where the next one computes none.",
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
        why="The order in which the schedules await gradients, for FrozenAwareCommunicator: another order would hang.",
        until="Stays while FrozenAwareCommunicator does.",
    ),
    Change(
        ours="training.checkpoints.writer.plan_writing",
        upstream="megatron.core.dist_checkpointing.serialization",
        replaces={"save": "977482f0"},
        how=How.INSTEAD,
        why="An error of one rank leaves the others waiting in their next collective.",
        until="Stays: main exchanges no errors either. From 0.19 on, the common state is saved with the tensors and "
        "not in common.pt.",
    ),
    Change(
        ours="training.checkpoints.writer.plan_writing",
        upstream="megatron.core.dist_checkpointing.strategies.filesystem_async",
        replaces={"_get_write_results_queue": "349269cb"},
        how=How.ATTRIBUTE,
        why="_results_queue is set before upstream fills it with the queue of a manager process, which it starts by "
        "spawn: seconds, and the main script imported again.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="training.checkpoints.writer._Strategy",
        upstream="megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy",
        replaces={"_get_save_and_finalize_callbacks": "098f6acc"},
        how=How.SUBCLASS,
        why="Each rank writes its file by `_write`, and all end by exchanging errors.",
        until="Stays while plan_writing does.",
    ),
    Change(
        ours="training.checkpoints.writer._write",
        upstream="megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync",
        replaces={"write_preloaded_data_multiproc": "bef05e8d"},
        how=How.INSTEAD,
        why="Upstream starts a process a file, and waits forever for one that was killed.",
        until="0.17, which writes with threads (#3633), if its function survives a full disk and a killed writer.",
    ),
)

_DATA = (
    Change(
        ours="data.dataset._Alone",
        upstream="megatron.core.datasets.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder",
        replaces={"build_generic_dataset": "07e19652", "_build_megatron_datasets_parallel": "3abb6c29"},
        how=How.SUBCLASS,
        why="The first rank builds index files while the others wait elsewhere, so that all can be told of its error.",
        until="Stays: main has the barrier inside.",
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
        until="Stays: upstream means these to be overridden.",
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
        why="The environment variable CUDA_DEVICE_MAX_CONNECTIONS is set to 1 where it is not set: the overlap of "
        "collectives with products relies on it.",
        until="Stays: the same in main.",
    ),
    Change(
        ours="runtime.cpu._megatron_rows",
        upstream="megatron.core.tensor_parallel.random",
        replaces={"_get_cuda_rng_state": "aa26caaa", "_set_cuda_rng_state": "b179c9d9"},
        how=How.ATTRIBUTE,
        why="Without a GPU the generator of the CPU stands in for that of the GPU.",
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
        why="In a dry run only: random states are data, which fake tensors have not.",
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
