"""Prefix tuning of encoder-decoders: a prefix that is a text's own keys and values is that text; parity with peft."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, families, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.inference import decode, evaluate, generate
from lora_jax.methods import p_tuning_v2, prefix_tuning
from lora_jax.model import prompts, transformer
from lora_jax.runs import experiment, sweep
from lora_jax.training import train
from tests import noise, terms, test_families, test_seq2seq
from tests.test_families import SEEN, SOURCE, TOKENS, hidden, jitted, pair
from tests.test_prefix import close, pytestmark, some, unwrapped  # noqa: F401, the marks of this module too
from tests.test_seq2seq import files  # noqa: F401, a fixture

KEY = jax.random.key(0)
P, S, E = 7, 11, 5
HF = test_families.T5 | {"model_type": "t5"}
CONFIG = dataclasses.replace(families.get("t5").config(HF), dtype="float32")
PAPER = {"cross": True, "encoder": True}
START, END = 0, 96


@functools.cache
def base():
  """Random parameters whose attention is far from uniform."""
  params = jax.jit(transformer.init, static_argnums=0)(CONFIG, KEY)
  return tree.map_named(lambda k, x: x if k.endswith("scale") else 3 * x, params)


def adapted(**kw):
  """(parameters, mask) with prefixes that matter wherever they can be."""
  return prefix_tuning.init(KEY, base(), **{"length": P, "std": 1.0} | PAPER | kw)


def batch():
  """Two examples, whose prompts and responses are of different lengths."""
  segments, weight = SEEN.astype(np.int32), (np.arange(9) < np.array([[9], [6]])).astype(np.float32)
  return dict(
    inputs=SOURCE.astype(np.int32),
    input_segments=segments,
    tokens=TOKENS[:, :9].astype(np.int32),
    targets=TOKENS[:, 1:10].astype(np.int32),
    weights=weight,
    segment_ids=weight.astype(np.int32),
    positions=np.tile(np.arange(9, dtype=np.int32), (2, 1)),
  )


def loss(params):
  total, weight, _ = terms.sums(train.Forward(CONFIG), params, batch())
  return total / weight


@functools.cache
def texts():
  """(parameters with the prefixes of a text's first P tokens and of the first E states, the others, their logits)."""
  params, tokens = base(), TOKENS[:1]
  states, seen = jax.random.normal(KEY, (1, E + S, CONFIG.d_model)), np.arange(E + S)[None] < E + S - 2
  want = jitted(CONFIG, params, tokens, encoded=states, seen=seen)[:, P:]
  cache = transformer.init_cache(CONFIG, 1, P, E + S)
  layers = hidden(CONFIG, params, tokens[:, :P], cache=cache, encoded=states, seen=seen)[1]["layers"]
  cross = {name: layers[f"cross_{name}"][:, 0, :E] for name in "kv"}
  prefix = prefix_tuning.Prefix(layers["k"][:, 0], layers["v"][:, 0], cross)
  return params | {"prefix": prefix}, tokens[:, P:], dict(encoded=states[:, E:], seen=seen[:, E:]), want


@pytest.mark.slow
def test_the_prefixes_of_a_text_and_of_states_are_those():
  params, tokens, given, want = texts()
  close(jitted(CONFIG, params, tokens, **given), want)
  for name in ("k", "cross"):
    other = params["prefix"].replace(**{name: jax.tree.map(jnp.zeros_like, getattr(params["prefix"], name))})
    assert np.abs(jitted(CONFIG, params | {"prefix": other}, tokens, **given) - want).max() > 1e-2


@pytest.mark.slow
def test_so_they_are_with_a_cache_and_in_segments():
  params, tokens, given, want = texts()
  n = tokens.shape[1]
  x, cache = hidden(CONFIG, params, tokens[:, :9], cache=transformer.init_cache(CONFIG, 1, n, S, P), **given)
  y, _ = hidden(CONFIG, params, tokens[:, 9:], cache=cache, positions=np.arange(9, n)[None])
  close(transformer.logits(CONFIG, params, jnp.concatenate([x, y], axis=1)), want)
  row = np.concatenate([tokens, tokens[:, :6]], axis=1)
  positions, segments = np.concatenate([np.arange(n), np.arange(6)])[None], np.repeat([1, 2], [n, 6])[None]
  got = jitted(CONFIG, params, row, positions=positions, segment_ids=segments, **given)
  close(got, np.concatenate([want, want[:, :6]], 1))


def test_the_prefix_of_an_encoder_is_a_text():
  """In its first layer, where a text's keys depend on nothing but its own tokens."""
  c, params = dataclasses.replace(CONFIG, encoder_layers=1), base()
  encoder = params["encoder"] | {"layers": jax.tree.map(lambda x: x[:1], params["encoder"]["layers"])}
  first = jax.tree.map(lambda x: x[0], encoder["layers"])
  h = transformer.normalise(c.encoder, params["embed"]["kernel"][SOURCE[0, :P]], first["attn_norm"])
  k, v = (jnp.einsum("PD,DKH->PKH", h, first["attn"][name]["kernel"])[None] for name in "kv")
  with_prefix = params | {"encoder": encoder | {"prefix": prefix_tuning.Prefix(k, v)}}
  encode = jax.jit(transformer.encode, static_argnums=0)
  want = encode(c, params | {"encoder": encoder}, SOURCE[:1], SEEN[:1])[:, P:]
  got = encode(c, with_prefix, SOURCE[:1, P:], SEEN[:1, P:])
  close(got[SEEN[:1, P:]], want[SEEN[:1, P:]])


@pytest.mark.slow
@pytest.mark.parametrize("kw", [{}, {"mlp": True, "hidden": 6}])
def test_all_of_it_is_trained(kw):
  """No gradient is zero; and a step of two members at once is that of each."""
  params, mask = adapted(**kw)
  trainable, frozen = tree.split(params, mask)
  assert methods.size(params, mask) == sum(x.size for x in jax.tree.leaves(trainable))
  step = jax.value_and_grad(lambda own: loss(tree.join(own, frozen)))
  members = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), trainable)
  losses, grads = jax.jit(jax.vmap(step))(members)
  for k, g in tree.flatten(grads).items():
    each = np.abs(g).max((-1, -2)) if g.ndim > 3 else np.abs(g)
    assert (each > 0).all(), k
  assert abs(losses[0] - losses[1]) > 1e-3
  one, g = jax.jit(step)(jax.tree.map(lambda x: x[1], members))
  np.testing.assert_allclose(losses[1], one, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5 * np.abs(b).max() + 1e-7), grads, g)


@pytest.mark.slow
def test_what_is_trained():
  params, mask = adapted()
  sizes = {k: x.shape for k, x in tree.flatten(params).items() if tree.flatten(mask)[k]}
  keys, own = (3, P, 4, 16), ("prefix/k", "prefix/v")
  across = ("prefix/cross/k", "prefix/cross/v")
  inside = dict.fromkeys(("encoder/prefix/k", "encoder/prefix/v"), (2, P, 4, 16))
  assert sizes == dict.fromkeys(own + across, keys) | inside
  assert len({float(tree.flatten(params)[k].sum()) for k in sizes}) == 6
  params, mask = prefix_tuning.init(KEY, base(), length=P)
  assert {k for k, m in tree.flatten(mask).items() if m} == set(own)
  params, mask = p_tuning_v2.init(KEY, base(), length=P, mlp=True, **PAPER)
  assert params["prefix"].up["bias"].shape == (3, 4, 4, 16) and params["prefix"].down["bias"].shape == (32,)
  assert params["encoder"]["prefix"].up["bias"].shape == (2, 2, 4, 16)
  assert "prefix" not in base()["encoder"]
  for refused in (weights.merge, lambda p: prefix_tuning.init(KEY, p)):
    with pytest.raises(errors.UserError, match="prefix"):
      refused(params)
  baked = prompts.bake(params)
  prefixes = baked["prefix"], baked["encoder"]["prefix"]
  assert all(isinstance(x, prefix_tuning.Prefix) for x in prefixes) and not prefixes[1].cross
  close(jitted(CONFIG, baked, TOKENS), jitted(CONFIG, params, TOKENS))


@pytest.mark.slow
def test_generation_and_scores_are_those_of_whole_texts():
  """Greedy, by beams, and the likelihoods of labels, each with a cache; against forwards without."""
  params, _ = adapted(mlp=True, hidden=6)
  params = prompts.bake(params)
  asked, mask = SOURCE.astype(np.int32), SEEN
  how = dict(max_new_tokens=6, end=(END,), start=START)
  *_, got = decode.continuations(CONFIG, params, asked, mask, **how)
  ids = np.full((2, 7), START, np.int32)
  for n in range(1, 7):  # what follows is seen by nobody
    logits = np.array(jitted(CONFIG, params, ids))
    ids[:, n] = logits[:, n - 1].argmax(-1)
  np.testing.assert_array_equal(got, ids[:, 1:])
  table = jax.nn.log_softmax(logits)
  best, scores = decode.beam_search(CONFIG, params, asked, mask, beams=3, length_penalty=0.0, **how)
  texts = np.pad(best[:, 0], [(0, 0), (1, 0)], constant_values=START)
  likely = jax.nn.log_softmax(jitted(CONFIG, params, texts))
  sums = [sum(likely[b, t, best[b, 0, t]] for t in range(6)) for b in range(2)]
  close(scores[:, 0], sums)
  assert (scores[:, 0] >= [sum(table[b, t, got[b, t]] for t in range(6)) - 1e-4 for b in range(2)]).all()
  labels = np.array([[[3, 4, 5], [6, 0, 0]]] * 2, np.int32), np.array([[3, 1]] * 2, np.int32)
  scored, again = evaluate.score(CONFIG, adapted(mlp=True, hidden=6)[0], asked, mask.sum(1), *labels, 6, (END,), START)
  np.testing.assert_array_equal(again, got)
  text = np.array([[START, 3, 4, 5, 0, 0, 0]] * 2, np.int32)
  likely = jax.nn.log_softmax(jitted(CONFIG, params, text))
  close(scored, np.stack([likely[:, 0, 3] + likely[:, 1, 4] + likely[:, 2, 5], likely[:, 0, 6]], 1))


@pytest.mark.slow
def test_programs_are_what_is_written():
  """With and without jit."""
  params, _ = adapted(mlp=True, hidden=6)
  kw = dict(encoded=transformer.encode(CONFIG, params, SOURCE, SEEN), seen=SEEN)
  close(transformer.apply(CONFIG, params, TOKENS, **kw), jitted(CONFIG, params, TOKENS))


@pytest.mark.parametrize("kw", [PAPER, {"cross": True}, {"encoder": True}, {}])
def test_what_is_saved_is_loaded(tmp_path, kw):
  """In PEFT's form if the decoder alone has a prefix, computed; else in ours, with the network."""
  model = models.Model("tiny", CONFIG, base(), None, HF)
  method = [{"name": "prefix_tuning", "length": P, "mlp": True, "hidden": 6, **kw}]
  params, mask = methods.init(KEY, model.params, method)
  params = noise.moved(params, mask)
  adapter.save(model, params, mask, method, tmp_path)
  saved = json.loads((tmp_path / "adapter_config.json").read_text())
  assert saved["peft_type"] == (adapter.TYPE if kw else "PREFIX_TUNING")
  loaded = adapter.load(model, tmp_path)
  want = params if kw else prompts.bake(params)
  assert jax.tree.structure(loaded) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0 if kw else 1e-6), loaded, want)


# As PEFT sets the number of layers, as it has to be set for a decoder of more of them than the encoder, and more.
LAYERS = {"t5": None, "t5-flan": 3, "mt5": 4}


def of_peft(theirs):
  """The logits of a peft model in its form for training, and its loss."""
  torch = pytest.importorskip("torch")
  labels = torch.tensor(TOKENS)
  given = dict(input_ids=torch.tensor(SOURCE), attention_mask=torch.tensor(SEEN).long(), labels=labels)
  with torch.no_grad():
    out = theirs(**given)
  return out.logits.numpy(), out.loss.item()


def agree(model, params, theirs):
  logits, loss = of_peft(theirs)
  shifted = np.pad(TOKENS, [(0, 0), (1, 0)], constant_values=START)[:, :-1]
  ours = jitted(model.config, params, shifted)
  np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=1e-4)
  assert np.abs(ours - jitted(model.config, model.params, shifted)).max() > 1e-2
  ll = np.take_along_axis(jax.nn.log_softmax(ours), TOKENS[..., None], axis=-1)
  np.testing.assert_allclose(-ll.mean(), loss, rtol=1e-5)


def generating(theirs):
  """A copy of a peft model that generates with its prefix.

  peft 0.21 hands it on as `past_key_values`, and takes the absence of these for the beginning of a text; transformers
  5.24 calls its cache `cache` and ignores what has the other name, with a warning, so that texts are those of the base.
  """
  theirs, own = copy.copy(theirs), theirs.prepare_inputs_for_generation

  def prepared(*args, **kw):
    given = own(*args, **kw)
    if "cache" in given and (prefix := given.pop("past_key_values", None)) and not given["cache"].get_seq_length():
      mine = given["cache"].self_attention_cache.layers
      for cache, layer in zip(mine, prefix.self_attention_cache.layers, strict=False):
        cache.update(layer.keys, layer.values)
    return given

  theirs.prepare_inputs_for_generation = prepared
  return theirs


@pytest.mark.parametrize("case", some(LAYERS, "t5 t5-flan"))
def test_peft_loads_what_we_save(tmp_path, case):
  peft = pytest.importorskip("peft")
  ref, model = pair(case)
  params, _ = prefix_tuning.init(KEY, model.params, length=P, std=1.0, mlp=case == "t5", hidden=8)
  peft_format.save(model, params, tmp_path)
  saved = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (saved["task_type"], saved["num_layers"]) == ("SEQ_2_SEQ_LM", 3)
  agree(model, params, peft.PeftModel.from_pretrained(unwrapped(ref), str(tmp_path)).eval())


@pytest.mark.parametrize("case", some(LAYERS, "t5 mt5"))
def test_we_load_what_peft_saves(tmp_path, case):
  """And of layers that share keys there each has its own here, of the same values."""
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  ref, model = pair(case)
  kw = dict(prefix_projection=True, encoder_hidden_size=12) if case == "mt5" else {}
  kw |= dict(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_layers=LAYERS[case], token_dim=64)
  torch.manual_seed(0)
  theirs = peft.get_peft_model(unwrapped(ref), peft.PrefixTuningConfig(**kw)).eval()
  theirs.save_pretrained(str(tmp_path))
  params = peft_format.load(model, tmp_path)
  agree(model, params, theirs)
  k = np.asarray(params["prefix"].k)
  assert len(np.unique(k[:, 0, 0, 0])) == {"t5": 1, "t5-flan": 3, "mt5": 2}[case]
  peft_format.save(model, params, tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, peft_format.load(model, tmp_path / "again"), params)


@pytest.mark.slow
def test_texts_are_those_of_peft(tmp_path):
  """Greedy and by beams. transformers 5.24 generates by no model whose decoder has more layers than its encoder."""
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  ref, model = pair("t5")
  params, _ = prefix_tuning.init(KEY, model.params, length=P, std=3.0)
  peft_format.save(model, params, tmp_path)
  theirs = generating(peft.PeftModel.from_pretrained(unwrapped(ref), str(tmp_path)).eval())
  how = dict(input_ids=torch.tensor(SOURCE), attention_mask=torch.tensor(SEEN).long(), max_new_tokens=6)
  how |= dict(do_sample=False, eos_token_id=END, pad_token_id=END)
  given, rest = (SOURCE, SEEN), dict(max_new_tokens=6, end=(END,), start=START)
  *_, greedy = decode.continuations(model.config, params, *given, **rest)
  *_, plain = decode.continuations(model.config, model.params, *given, **rest)
  np.testing.assert_array_equal(greedy, theirs.generate(**how)[:, 1:])
  assert (greedy != plain).any()
  texts = theirs.generate(**how, num_beams=3)[:, 1:]
  np.testing.assert_array_equal(decode.beam_search(model.config, params, *given, beams=3, **rest)[0][:, 0], texts)


def test_what_peft_cannot_hold_or_run_is_refused(tmp_path):
  """A table of fewer layers than the decoder has, where peft runs out of them, and one that is no whole number."""
  model = models.Model("tiny", CONFIG, base(), None, HF)
  with pytest.raises(peft_format.NoForm, match="not support a prefix of an encoder"):
    peft_format.save(model, adapted()[0], tmp_path / "none")
  for n in (2, 3.5):
    tensors = {"prompt_embeddings": np.zeros((P, int(n * 2 * 64)), np.float32)}
    peft_format.write(tmp_path, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": P}, tensors)
    with pytest.raises(errors.UserError, match=r"expected \(7, 384\)"):
      peft_format.load(model, tmp_path)


@pytest.mark.slow
def test_a_run_and_members_of_a_sweep(files, tmp_path):  # noqa: F811
  """It learns the task, and is among others what it is alone."""
  settings = test_seq2seq.config(files)
  settings["method"] = {"name": "prefix_tuning", "length": 6, "mlp": True, "hidden": 32, **PAPER}
  alone = experiment.run(settings, tmp_path / "run")
  assert alone["eval"]["before"]["accuracy"] <= 0.5 and alone["eval"]["after"]["accuracy"] == 1.0
  trained = experiment.trained(tmp_path / "run")
  start = models.load(str(files / "model"), dtype="float32")
  loaded = adapter.load(start, tmp_path / "run" / "adapter")
  jax.tree.map(np.testing.assert_array_equal, loaded, trained.params)
  asked = [r["prompt"] for r in test_seq2seq.rows(4)]
  want = [r["response"] for r in test_seq2seq.rows(4)]
  assert generate.generate(trained, asked, max_new_tokens=4) == want
  both = sweep.run(settings | {"sweep": {"product": {"train": {"seed": (1, 2)}}}}, tmp_path / "sweep")
  assert both["groups"] == [[m["name"] for m in both["members"]]]
  assert both["members"][0]["train"]["loss_last"] == pytest.approx(alone["train"]["loss_last"], rel=1e-3)
  assert all(m["eval"]["after"]["accuracy"] == 1.0 for m in both["members"])
