"""T5, T5 1.1 and Flan-T5.

Raffel et al. 2020 (https://arxiv.org/abs/1910.10683); Chung et al. 2022 (https://arxiv.org/abs/2210.11416).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax import families
from lora_jax.families import Key, linear, norm
from lora_jax.model import transformer

ARCHITECTURES = {"lm": "T5ForConditionalGeneration", "none": "T5Model"}
ALIASES = {"T5WithLMHeadModel": "lm"}  # the older name
PREFIX = ""
IGNORED = r"EncDecAttention\.relative_attention_bias\.weight$"
ONE_TABLE = True  # as in transformers 5


def _attention(path: str, hf: str) -> tuple[Key, ...]:
  into = [linear(f"{path}/{c}", f"{hf}.{c}", "(n h) d -> d n h")[0] for c in "qkv"]
  return *into, linear(f"{path}/o", f"{hf}.o", "d (n h) -> n h d")[0]


def _stack(path: str, hf: str, feed_forward: int) -> tuple[Key, ...]:
  """The rows of the encoder or the decoder, whose feed-forward layer is sublayer number `feed_forward`."""
  block, mlp = f"{hf}.block.{{}}.layer", f"{hf}.block.{{}}.layer.{feed_forward}"
  return (
    norm(f"{path}layers/attn_norm", f"{block}.0.layer_norm")[0],
    *_attention(f"{path}layers/attn", f"{block}.0.SelfAttention"),
    norm(f"{path}layers/mlp_norm", f"{mlp}.layer_norm")[0],
    Key(f"{path}layers/mlp/up/kernel", f"{mlp}.DenseReluDense.wi.weight", "f d -> d f", ("gated", False)),
    Key(f"{path}layers/mlp/gate/kernel", f"{mlp}.DenseReluDense.wi_0.weight", "f d -> d f", ("gated", True)),
    Key(f"{path}layers/mlp/up/kernel", f"{mlp}.DenseReluDense.wi_1.weight", "f d -> d f", ("gated", True)),
    Key(f"{path}layers/mlp/down/kernel", f"{mlp}.DenseReluDense.wo.weight", "d f -> f d"),
    Key(f"{path}relative_bias", f"{hf}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "c n -> c n"),
    norm(f"{path}norm", f"{hf}.final_layer_norm")[0],
  )


LOOKUPS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
KEYS = (
  Key("embed/kernel", "shared.weight", "v d -> v d", also=LOOKUPS),
  *_stack("encoder/", "encoder", 1),
  *_stack("", "decoder", 2),
  norm("layers/cross_norm", "decoder.block.{}.layer.1.layer_norm")[0],
  *_attention("layers/cross", "decoder.block.{}.layer.1.EncDecAttention"),
  Key("head/kernel", "lm_head.weight", "v d -> d v"),
)
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
HANDLED = (
  *SIZES,
  *("num_decoder_layers", "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
  *("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"),
)
DEFAULT = {"is_encoder_decoder": True, "quantization_config": None}
NO_EFFECT = {"dropout_rate", "initializer_factor", "n_positions"}


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `T5Config` as a dict; UserError for what it does not support.

  T5 1.0 ties the head and scales its input, 1.1 does neither. transformers 5 writes `tie_word_embeddings=True` for
  both and says which it is with `scale_decoder_outputs`. A head that is scaled but not tied has both keys.
  """
  tied, scaled = hf.get("tie_word_embeddings") is not False, hf.get("scale_decoder_outputs")
  scaled = tied if scaled is None else scaled
  c = encoder_decoder(hf, "relu", tied=tied and scaled)
  return dataclasses.replace(c, head_scale=c.d_model**-0.5 if scaled else None)


def encoder_decoder(hf: Mapping, feed_forward: str, **choices: Any) -> transformer.Config:
  """The config of a model of T5's shape; `feed_forward` is what an absent `feed_forward_proj` means."""
  families.check_config(hf, HANDLED, DEFAULT, families.BOOKKEEPING | NO_EFFECT)
  feed_forward = hf.get("feed_forward_proj") or feed_forward
  activation = "gelu_new" if feed_forward == "gated-gelu" else feed_forward.removeprefix("gated-")
  activation = hf.get("dense_act_fn") or activation
  families.require(hf, SIZES, activation)
  heads, gated = hf["num_heads"], feed_forward.startswith("gated-")
  return transformer.Config(
    vocab_size=hf["vocab_size"],
    d_model=hf["d_model"],
    n_layers=hf.get("num_decoder_layers") or hf["num_layers"],
    encoder_layers=hf["num_layers"],
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=hf["d_kv"],
    d_ff=hf["d_ff"],
    norm_eps=hf.get("layer_norm_epsilon", 1e-6),
    activation=activation,
    gated=hf.get("is_gated_act", gated),
    attn_scale=1.0,
    position="relative",
    relative_buckets=hf.get("relative_attention_num_buckets", 32),
    relative_furthest=hf.get("relative_attention_max_distance", 128),
    **choices,
  )
