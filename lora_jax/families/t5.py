"""T5, T5 1.1 and Flan-T5.

Raffel et al. 2020 (https://arxiv.org/abs/1910.10683); Chung et al. 2022 (https://arxiv.org/abs/2210.11416).
"""

from collections.abc import Mapping

from lora_jax.families import Key, linear, norm
from lora_jax.families.config_json import ConfigJson
from lora_jax.families.config_json.option import Option, derived, fallback, number

ARCHITECTURES = {"lm": "T5ForConditionalGeneration", "none": "T5Model"}
PREFIX = ""
IGNORED = r"EncDecAttention\.relative_attention_bias\.weight$"
ONE_TABLE = True  # as in transformers 5


def _attention(path: str, hf: str) -> tuple[Key, ...]:
  into = [linear(f"{path}/{c}", f"{hf}.{c}", "(n h) d -> d n h")[0] for c in "qkv"]
  return *into, linear(f"{path}/o", f"{hf}.o", "d (n h) -> n h d")[0]


def _stack(path: str, hf: str, feed_forward: int) -> tuple[Key, ...]:
  """Returns the rows of the encoder or decoder; `feed_forward` is the index of the feed-forward sublayer."""
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


def feed_forward(absent: str) -> Option:
  """Returns the option for `activation` and `gated`, in one word or two keys; `absent` is the default word."""

  def read(hf):
    word = hf.get("feed_forward_proj") or absent
    name = "gelu_new" if word == "gated-gelu" else word.removeprefix("gated-")
    gated = hf.get("is_gated_act", word.startswith("gated-"))
    return {"activation": hf.get("dense_act_fn") or name, "gated": bool(gated)}

  def write(c):
    name = "gelu" if c.gated and c.activation == "gelu_new" else c.activation
    word = f"gated-{name}" if c.gated else name
    return {"feed_forward_proj": word, "dense_act_fn": c.activation, "is_gated_act": c.gated}

  return Option(("activation", "gated"), ("feed_forward_proj", "dense_act_fn", "is_gated_act"), read, write)


def _head(hf: Mapping) -> dict:
  """Returns `tied` and `head_scale`. T5 1.0 ties the head and scales its input; 1.1 does neither.

  transformers 5 writes `tie_word_embeddings=True` for both, and distinguishes them by `scale_decoder_outputs`. A head
  that is scaled but not tied has both keys.
  """
  tied, scaled = hf.get("tie_word_embeddings") is not False, hf.get("scale_decoder_outputs")
  scaled = tied if scaled is None else scaled
  return {"tied": tied and scaled, "head_scale": hf["d_model"] ** -0.5 if scaled else None}


TABLE = ConfigJson(
  "t5",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "d_model"),
    number("head_dim", "d_kv"),
    number("d_ff", "d_ff"),
    number("encoder_layers", "num_layers"),
    fallback("n_layers", "num_decoder_layers", lambda hf: hf["num_layers"]),
    number("n_heads", "num_heads"),
    derived("n_kv_heads", lambda hf: hf["num_heads"]),
    number("relative_buckets", "relative_attention_num_buckets"),
    number("relative_furthest", "relative_attention_max_distance"),
    number("norm_eps", "layer_norm_epsilon"),
    feed_forward("relu"),
    Option(
      ("tied", "head_scale"),
      ("tie_word_embeddings", "scale_decoder_outputs"),
      _head,
      lambda c: {"tie_word_embeddings": c.tied, "scale_decoder_outputs": c.head_scale is not None},
    ),
  ),
  absent={
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
  },
  fixed={"attn_scale": 1.0, "position": "relative"},
  default={"is_encoder_decoder": True, "quantization_config": None},
  ignored=("dropout_rate", "initializer_factor", "n_positions"),
  aliases={"T5WithLMHeadModel": "lm"},  # the older name
  by_tensors=("tied",),
)
config, hf_config = TABLE.config, TABLE.hf_config
