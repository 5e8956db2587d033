"""Adapts any model: a Flax module (linen, nnx), or any function of a tree of parameters."""

from lora_jax.bridges.flax_layers import linen, nnx
from lora_jax.bridges.function import adapt

__all__ = ["adapt", "linen", "nnx"]
