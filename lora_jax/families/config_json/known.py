"""The known keys of config.json; a key that is neither read nor known to have no effect is refused."""

from collections.abc import Iterable, Mapping

from lora_jax import errors
from lora_jax.families.reading import options


def check(hf: Mapping, handled: Iterable[str], default: Mapping, ignored: Iterable[str]) -> None:
  """Raises UserError that lists every key of an HF config that is neither understood nor known to have no effect.

  Values that are null, false or empty have no effect, except for keys whose absence means something else.

  Args:
    handled: keys that the family reads.
    default: keys that are supported only at the given value.
    ignored: keys that do not change the forward pass.
  """
  options.check(hf)
  handled, ignored, default = set(handled), BOOKKEEPING | set(ignored), PLAIN | default
  off = lambda x: x is None or x is False or x in ("", [], {})
  fits = lambda x, v: x == v or off(x) and off(v) or x is None and v == 1 and v is not True  # a factor of one is none
  bad = [f"{k}={hf[k]!r} (only {v!r} is supported)" for k, v in default.items() if k in hf and not fits(hf[k], v)]
  unknown = sorted(hf.keys() - handled - default.keys() - ignored)
  bad += [f"{k}={hf[k]!r} (unknown)" for k in unknown if not off(hf[k])]
  if bad:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model: " + "; ".join(bad))


# Keys of any config.json that are supported only at this value.
PLAIN = {
  "is_decoder": False,
  "is_causal": True,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "cross_attention_hidden_size": None,
  "tie_encoder_decoder": False,
  "pruned_heads": {},
}
# Keys of any config.json that describe how a model is saved, trained, served or sampled, not what it computes.
BOOKKEEPING = frozenset(
  (
    "_name_or_path architectures attention_dropout bos_token_id eos_token_id pad_token_id dtype torch_dtype "
    "initializer_range model_type transformers_version transformers.js_config use_cache name_or_path "
    "is_llama_config rope_interleaved unsloth_version unsloth_fixed auto_map id2label label2id num_labels "
    "problem_type classifier_dropout _attn_implementation _attn_implementation_autoset gradient_checkpointing "
    "output_attentions output_hidden_states output_past return_dict task_specific_params sep_token_id cls_token_id "
    "mask_token_id unk_token_id eos_token_ids decoder_start_token_id finetuning_task torchscript prefix _num_labels "
    "custom_pipelines tokenizer_class max_sequence_length model_max_length chunk_size_feed_forward use_bfloat16 "
    "tf_legacy_loss _commit_hash attn_implementation "
    "do_sample num_beams max_length min_length max_new_tokens min_new_tokens top_k top_p typical_p temperature "
    "repetition_penalty length_penalty num_return_sequences early_stopping no_repeat_ngram_size num_beam_groups "
    "encoder_no_repeat_ngram_size diversity_penalty bad_words_ids output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
  ).split()
)
