"""LLaMA Pro block expansion and post-pretraining on megatron.core."""

__version__ = "0.1.0"
