"""Prefix tuning and P-tuning v2: a prefix that is a text's own keys and values is that text; parity with peft."""

import copy
import dataclasses
import functools
import inspect

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, families, tree
from lora_jax.formats import peft as peft_format
from lora_jax.inference import decode, evaluate
from lora_jax.methods import p_tuning_v2, prefix_tuning
from lora_jax.model import prompts, transformer
from tests import test_families
from tests.test_families import SMALL, TOKENS, hidden, jitted, pair

pytestmark = [
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
  pytest.mark.filterwarnings("ignore:The `cache_position` argument:FutureWarning"),
  pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # what PEFT calls it by
]
KEY = jax.random.key(0)
T, P = TOKENS.shape[1], 7


def config(kind, **hf):
  kw = {
    "llama": SMALL,
    "mistral": SMALL,
    "gpt2": test_families.GPT2,
    "phi3": test_families.PHI3,
    "opt": test_families.OPT_350M,
  }
  kw |= {"gemma2": test_families.GEMMA2, "gemma3_text": test_families.GEMMA2, "qwen3": SMALL | dict(head_dim=16)}
  return dataclasses.replace(families.get(kind).config(kw[kind] | hf | {"model_type": kind}), dtype="float32")


# What differs in attention: rotated, learned and relative to a window, local layers among others, fused matrices,
# grouped heads, normed keys, soft-capped logits, frequencies that depend on the length, a parallel feed-forward.
CONFIGS = {
  "llama": config("llama"),
  "llama-unrolled": dataclasses.replace(config("llama"), scan=False),
  "llama-remat": dataclasses.replace(config("llama"), remat=True),
  "mistral": config("mistral", sliding_window=5),
  "gemma2": config("gemma2", num_hidden_layers=3),
  "gemma3": config("gemma3_text", num_hidden_layers=6),
  "gemma3-unrolled": dataclasses.replace(config("gemma3_text", num_hidden_layers=6), scan=False),
  "gpt2": config("gpt2"),
  "opt": config("opt"),
  "phi3": config(
    "phi3",
    original_max_position_embeddings=20,
    rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.5, 4.0, 9.0, 11.0]),
  ),
  "qwen3": config("qwen3"),
}


@functools.cache
def base(name):
  """Random parameters whose attention is far from uniform."""
  params = transformer.init(CONFIGS[name], KEY)
  return tree.map_named(lambda k, x: x if k.endswith(("scale", "bias")) else 5 * x, params)


def of_text(c, params, tokens):
  """The prefix whose keys and values are those of tokens [P]."""
  cache = transformer.init_cache(c, 1, len(tokens))
  _, cache = transformer.hidden(c, params, tokens[None], cache=cache, length=jnp.int32(T))
  return prefix_tuning.Prefix(*(cache["layers"][name][:, 0] for name in "kv"))


def some(names, fast):
  """All of the names, those that are not among `fast` marked as slow."""
  return [n if n in fast.split() else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(params=some(CONFIGS, "mistral gemma3 gpt2 phi3 llama-unrolled"))
def texts(request):
  """(config, parameters with the prefix of a text's first P tokens, the others, their logits in the whole text)."""
  c, params, tokens = CONFIGS[request.param], base(request.param), TOKENS[:1]
  want = jitted(c, params, tokens)[:, P:]
  return c, params | {"prefix": of_text(c, params, tokens[0, :P])}, tokens[:, P:], want


close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_prefix_of_a_text_is_that_text(texts):
  """Without a mask, with one, and with a cache that is filled in two parts."""
  c, params, tokens, want = texts
  assert np.abs(want - jitted(c, prompts.without(params) | {"prefix": zero(params)}, tokens)).max() > 1e-2
  close(jitted(c, params, tokens), want)
  close(jitted(c, params, tokens, segment_ids=np.ones(tokens.shape, int)), want)
  length, cache = jnp.int32(T - P), transformer.init_cache(c, 1, T - P, prefix=P)
  x, cache = hidden(c, params, tokens[:, :9], cache=cache, length=length)
  at = np.arange(9, T - P)[None]
  y, _ = hidden(c, params, tokens[:, 9:], cache=cache, positions=at, length=length)
  close(transformer.logits(c, params, jnp.concatenate([x, y], axis=1)), want)


def zero(params):
  return jax.tree.map(jnp.zeros_like, params["prefix"])


def test_examples_of_a_packed_row_see_it_each(texts):
  c, params, tokens, want = texts
  n = T - P
  row = np.concatenate([tokens, tokens[:, : n - 4], np.zeros((1, 3), int)], axis=1)
  segments = np.repeat([1, 2, 0], [n, n - 4, 3])[None]
  positions = np.concatenate([np.arange(n), np.arange(n - 4), np.zeros(3, int)])[None]
  got = jitted(c, params, row, positions=positions, segment_ids=segments, length=jnp.int32(n))
  close(got[:, :n], want)
  close(got[:, n : 2 * n - 4], want[:, : n - 4])


@pytest.mark.slow
def test_generation_and_scores_are_those_of_the_whole_text():
  """Greedy, sampled, by beams, and the likelihoods of labels; prompts of two lengths."""
  c, params = CONFIGS["gpt2"], base("gpt2")
  before, asked, lengths = TOKENS[0, :P].astype(np.int32), TOKENS[:, P : P + 6].astype(np.int32), np.array([6, 4])
  whole = np.concatenate([np.tile(before, (2, 1)), asked], axis=1)
  mask, full = np.arange(6) < lengths[:, None], np.arange(P + 6) < P + lengths[:, None]
  adapted = params | {"prefix": of_text(c, params, before)}
  how = dict(max_new_tokens=8, end=(96,))
  *_, want = decode.continuations(c, params, whole, full, **how)
  *_, got = decode.continuations(c, adapted, asked, mask, **how)
  np.testing.assert_array_equal(got, want)
  for a, b in zip(
    decode.beam_search(c, adapted, asked, mask, beams=3, **how),
    decode.beam_search(c, params, whole, full, beams=3, **how),
    strict=True,
  ):
    close(a, b)
  labels = np.array([[[3, 4, 5], [6, 0, 0]]] * 2, np.int32), np.array([[3, 1]] * 2, np.int32)
  a = evaluate.score(c, adapted, asked, lengths, *labels, 3, (96,))
  b = evaluate.score(c, params, whole, P + lengths, *labels, 3, (96,))
  jax.tree.map(close, a, b)


@pytest.mark.slow
def test_learned_positions_hold_the_prefix_too():
  c, params = CONFIGS["gpt2"], prefix_tuning.init(KEY, base("gpt2"), length=10)[0]
  assert jitted(c, params, np.ones((1, 54), int)).shape == (1, 54, 97)
  with pytest.raises(errors.UserError, match="65 tokens are more than the 64 positions"):
    transformer.apply(c, params, np.ones((1, 55), int))
  *_, got = decode.continuations(c, params, np.ones((1, 50)), max_new_tokens=4)
  assert got.shape == (1, 4)
  with pytest.raises(errors.UserError, match="exceed the 54 positions"):
    next(decode.continuations(c, params, np.ones((1, 50)), max_new_tokens=5))


@pytest.mark.slow
def test_gradients_are_summed_in_float32():
  """The gradient of 512 equal rows is 512 times that of one, also where activations are bfloat16."""
  c = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16", n_layers=1)
  params = prefix_tuning.init(KEY, transformer.init(c, KEY), length=P, std=1.0)[0]

  def gradient(tokens):
    y = lambda prefix: transformer.hidden(c, params | {"prefix": prefix}, tokens)[0].astype(jnp.float32).sum()
    return jax.jit(jax.grad(y))(params["prefix"]).v

  one = gradient(TOKENS[:1, :2])
  np.testing.assert_allclose(
    gradient(np.tile(TOKENS[:1, :2], (512, 1))), 512 * one, atol=1e-2 * 512 * np.abs(one).max()
  )


def test_initial_values():
  c = CONFIGS["llama"]
  params, mask = prefix_tuning.init(KEY, base("llama"), length=5, std=0.5)
  k, v = params["prefix"].k, params["prefix"].v
  assert k.shape == v.shape == (3, 5, c.n_kv_heads, c.head_dim) and k.dtype == jnp.float32
  np.testing.assert_allclose([k.std(), v.std()], 0.5, rtol=0.1)
  assert not np.array_equal(k, v)
  assert {n for n, m in tree.flatten(mask).items() if m} == {"prefix/k", "prefix/v"}
  params, mask = prefix_tuning.init(KEY, base("llama"), length=5, mlp=True, hidden=6)
  trained = {n: x.shape for n, x in tree.flatten(params).items() if tree.flatten(mask)[n]}
  layers = "prefix/down/bias prefix/down/kernel prefix/embedding prefix/up/bias prefix/up/kernel"
  assert trained == dict(zip(layers.split(), [(6,), (32, 6), (5, 32), (3, 2, 2, 8), (6, 3, 2, 2, 8)], strict=True))
  own = p_tuning_v2.init(KEY, base("llama"), length=5, mlp=True)[0]["prefix"]
  assert own.down["kernel"].shape == (32, 32)


def test_a_baked_network_computes_the_same():
  c = CONFIGS["mistral"]
  params, _ = prefix_tuning.init(KEY, base("mistral"), length=5, mlp=True, hidden=6)
  baked = prompts.bake(params)
  assert isinstance(baked["prefix"], prefix_tuning.Prefix) and prompts.prefix_length(params) == 5
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), baked["prefix"](), params["prefix"]())
  close(jitted(c, baked, TOKENS), jitted(c, params, TOKENS))


def test_the_network_is_that_of_peft():
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  L, K, H, C = 3, 2, 8, 6
  kw = dict(num_virtual_tokens=P, token_dim=K * H, num_layers=L, encoder_hidden_size=C, prefix_projection=True)
  theirs = peft.tuners.PrefixEncoder(peft.PrefixTuningConfig(peft_type="PREFIX_TUNING", task_type="CAUSAL_LM", **kw))
  down, up = theirs.transform[0], theirs.transform[2]
  array = lambda x, pattern="...-> ...", **n: jnp.asarray(einops.rearrange(x.detach().numpy(), pattern, **n))
  ours = prefix_tuning.Projected(
    array(theirs.embedding.weight),
    {"kernel": array(down.weight, "c d -> d c"), "bias": array(down.bias)},
    {
      "kernel": array(up.weight, "(l s k h) c -> c l s k h", l=L, s=2, k=K),
      "bias": array(up.bias, "(l s k h) -> l s k h", l=L, s=2, k=K),
    },
  )
  want = theirs(torch.arange(P)).detach().numpy()
  want = einops.rearrange(want, "p (l s k h) -> s l p k h", l=L, s=2, k=K)
  np.testing.assert_allclose([ours()["attn"][name] for name in "kv"], want, atol=1e-6)


CASES = "llama mistral-window gpt2 phi3-long qwen3-window gemma2 gemma3 neox opt-350m bert-classifier".split()


def adapt(case, **kw):
  """(transformers model, ours, parameters with a prefix that matters)."""
  ref, model = pair(case)
  params, _ = prefix_tuning.init(KEY, model.params, length=P, std=1.0, **kw)
  return ref, model, params


def first(theirs):
  """The first output of peft's model."""
  torch = pytest.importorskip("torch")

  tokens, mask = torch.tensor(TOKENS), torch.ones(TOKENS.shape, dtype=torch.long)
  with torch.no_grad():
    if not refused(theirs):
      return theirs(input_ids=tokens, attention_mask=mask)[0].numpy()
    mask = torch.cat([torch.ones(len(mask), P, dtype=torch.long), mask], dim=1)
    return theirs.base_model(tokens, attention_mask=mask, cache=theirs.get_prompt(len(tokens)))[0].numpy()


def refused(theirs):
  """peft 0.21 refuses a prefix for classifiers without `past_key_values`, since transformers 5.24 named `cache`."""
  base, config = theirs.base_model, theirs.active_peft_config
  names = [inspect.signature(f).parameters for f in (base.forward, base.base_model.forward)]
  prefixed = (config.peft_type, config.task_type) == ("PREFIX_TUNING", "SEQ_CLS")
  return prefixed and not any("past_key_values" in n for n in names)


@pytest.mark.parametrize("case", some(CASES, "llama mistral-window gpt2 gemma2 bert-classifier"))
def test_peft_loads_what_we_save(tmp_path, case):
  peft = pytest.importorskip("peft")
  ref, model, params = adapt(case, mlp=case == "llama", hidden=8)
  heads = model.head_leaves
  peft_format.save(model, params, tmp_path, [n for n in tree.names(params) if n.startswith(("prefix/", *heads))])
  theirs = peft.PeftModel.from_pretrained(unwrapped(ref), str(tmp_path)).eval()
  ours = jitted(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - jitted(model.config, model.params, TOKENS)).max() > 1e-2


def unwrapped(ref):
  """A copy that peft may put its own modules into."""
  return copy.deepcopy(ref)


@pytest.mark.parametrize("case", some(CASES, "llama mistral-window gpt2 gemma2 bert-classifier"))
def test_we_load_what_peft_saves(tmp_path, case):
  peft = pytest.importorskip("peft")
  ref, model, _ = adapt(case)
  kind = "SEQ_CLS" if case == "bert-classifier" else "CAUSAL_LM"
  kw = dict(prefix_projection=True, encoder_hidden_size=12) if case == "llama" else {}
  theirs = peft.get_peft_model(
    unwrapped(ref), peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=P, **kw)
  ).eval()
  theirs.save_pretrained(str(tmp_path))
  params = peft_format.load(model, tmp_path)
  ours = jitted(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - jitted(model.config, model.params, TOKENS)).max() > 1e-2
