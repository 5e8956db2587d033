"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Its matrices are stored [in, out], and query, key and value are one.
"""

from lora_jax.families import Key, linear, norm
from lora_jax.families.config_json import ConfigJson
from lora_jax.families.config_json.option import LABELS, equal_heads, fallback, flag, number, optional

ARCHITECTURES = {"lm": "GPT2LMHeadModel", "classification": "GPT2ForSequenceClassification", "none": "GPT2Model"}
PREFIX = "transformer."
IGNORED = r"\.attn\.(masked_)?bias$"
KEYS = (
  Key("embed/kernel", "transformer.wte.weight", "v d -> v d"),
  Key("embed/positions", "transformer.wpe.weight", "t d -> t d"),
  *norm("layers/attn_norm", "transformer.h.{}.ln_1"),
  *linear("layers/attn/qkv", "transformer.h.{}.attn.c_attn", "d (m h) -> d m h"),
  *linear("layers/attn/o", "transformer.h.{}.attn.c_proj", "(n h) d -> n h d"),
  *norm("layers/mlp_norm", "transformer.h.{}.ln_2"),
  *linear("layers/mlp/up", "transformer.h.{}.mlp.c_fc", "d f -> d f"),
  *linear("layers/mlp/down", "transformer.h.{}.mlp.c_proj", "f d -> f d"),
  *norm("norm", "transformer.ln_f"),
  Key("head/kernel", "lm_head.weight", "v d -> d v"),
  Key("classifier/kernel", "score.weight", "c d -> d c"),
)

TABLE = ConfigJson(
  "gpt2",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "n_embd"),
    number("n_layers", "n_layer"),
    number("n_heads", "n_head"),
    *equal_heads("n_embd", "n_head"),
    fallback("d_ff", "n_inner", lambda hf: 4 * hf["n_embd"]),
    number("max_seq_len", "n_positions", "n_ctx"),
    optional("activation", "activation_function", null="gelu_new"),
    number("norm_eps", "layer_norm_epsilon"),
    flag("attn_scale", "scale_attn_weights", None, 1.0),
    flag("tied", "tie_word_embeddings"),
    LABELS,
  ),
  absent={
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
  },
  fixed=dict(norm="layer", gated=False, fused=True, attn_bias="all", mlp_bias=True, position="learned", pool="last"),
  default={"scale_attn_by_inverse_layer_idx": False},
  # The summary keys belong to a head that is not supported.
  ignored=(
    *"attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn summary_type summary_use_proj".split(),
    *"summary_activation summary_proj_to_labels summary_first_dropout n_special predict_special_tokens".split(),
  ),
)
config, hf_config = TABLE.config, TABLE.hf_config
