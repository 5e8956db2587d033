"""The laws of every method, over three architectures and two dtypes of the base. A new module is found by itself."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from lora_jax import errors, families, methods, models, tree, weights
from lora_jax.formats import adapter
from lora_jax.model import prompts, transformer
from lora_jax.training import optim, train
from lora_jax.weights import updates as updates_lib
from tests import terms
from tests.noise import moved

KEY = jax.random.key(0)
LLAMA = dict(model_type="llama", vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64)
GPT2 = dict(model_type="gpt2", vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64)
BERT = dict(model_type="bert", vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
BERT |= dict(intermediate_size=24, max_position_embeddings=64)
MODELS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}
DTYPES = ("float32", "bfloat16")
# Keywords that make a method do all it can, where its defaults do not fit so small a model.
SETTINGS = {
  "adalora": {"targets": "^(layers/.*|classifier/)kernel$", "alpha": 256.0},
  "dora": {"targets": "^(layers/.*|classifier/)kernel$", "alpha": 64.0, "rank_pattern": {"layers/1/": 3}},
  "vera": {"targets": "^(layers/.*|classifier/)kernel$", "d_init": 1.0},
  "intrinsic": {"targets": "^(layers/.*|classifier/)kernel$", "layer_scales": True},
  "lora": {"targets": "^(layers/.*|classifier/)kernel$", "alpha": 64.0},
  "lora_fa": {"targets": "^(layers/.*|classifier/)kernel$", "alpha": 64.0},
  "lora_plus": {"targets": "^(layers/.*|classifier/)kernel$", "alpha": 64.0},
  "olora": {"targets": "^(layers/.*|classifier/)kernel$", "rank": 3, "alpha": 12.0},
  "pissa": {"targets": "^(layers/.*|classifier/)kernel$", "rank": 3, "alpha": 64.0},
  "rslora": {"targets": "^(layers/.*|classifier/)kernel$", "alpha": 16.0},
  "loha": {"targets": "all-linear", "rank": 2, "alpha": 64.0},
  "lokr": {"targets": "kernel$", "rank": 1, "alpha": 16.0, "decompose_both": True},
  "galore": {"rank": 4},
  "p_tuning": {"encoder": "lstm"},
  "partial": {"layers": 1},
  "relora": {"alpha": 64.0},
  "prefix_tuning": {"mlp": True},
  "tokens": {"ids": list(range(1, 61))},
}
NOISE = 0.05  # how far trained leaves are moved from where they start
FURTHER = {"ia3": 1.0}  # of methods whose effect on so small a model would be lost in rounding
ROUNDING = 2**-5  # of bfloat16 in two layers, of the largest output: a few of its 8 bits are lost in sums


def _case(name, kind, dtype):
  """Other architectures and bfloat16 are slow by their number alone."""
  quick = (kind, dtype) == ("llama", "float32")
  return pytest.param(name, kind, dtype, marks=[] if quick else pytest.mark.slow)


CASES = [_case(n, m, d) for n in methods.names() for m in MODELS for d in DTYPES]
every = pytest.mark.parametrize("name, kind, dtype", CASES)


@functools.cache
def model(kind, dtype="float32"):
  hf = MODELS[kind]
  family = families.get(hf["model_type"])
  head = "classification" if kind == "bert" else "lm"
  config = dataclasses.replace(family.config(hf), dtype=dtype, head=head, n_labels=3)
  return models.Model(kind, config, transformer.init(config, jax.random.key(7)), None, dict(hf))


def spec(name):
  return [{"name": name, **SETTINGS.get(name, {})}]


def batch(seed=0, rows=4, length=12):
  rng = np.random.default_rng(seed)
  tokens, lengths = rng.integers(1, 61, (rows, length)), np.full(rows, length, np.int32)
  return dict(
    tokens=tokens.astype(np.int32),
    targets=np.roll(tokens, -1, 1).astype(np.int32),
    weights=np.ones((rows, length), np.float32),
    positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
    segment_ids=np.ones((rows, length), np.int32),
    lengths=lengths,
  )


@dataclasses.dataclass(frozen=True)
class Forward(train.Forward):
  """One whose states serve both a model's outputs and its loss: they are compiled once."""

  states: list = dataclasses.field(default_factory=list, compare=False)

  def __call__(self, params, batch):
    if not self.states:
      self.states.append(super().__call__(params, batch))
    return self.states[0]


def outputs(config, params, forward=None):
  """What the model says of a batch: logits, or a classifier's outputs."""
  b, forward = prompts.insert_batch(params, batch()), forward or train.Forward(config)
  if config.head == "classification":
    return forward.classify(params, b)
  return forward.logits(transformer.head(params), forward(params, b))


def gradients(config, trainable, frozen):
  """(gradients of the mean loss of a batch, outputs)."""

  def loss(trainable):
    kind, b, forward = "causal_lm", batch(), Forward(config)
    if config.head == "classification":
      kind, b = "classification", b | {"labels": np.arange(4, dtype=np.int32) % 3, "weights": np.ones(4, np.float32)}
    params = tree.join(trainable, frozen)
    total, weight, _ = terms.sums(forward, params, prompts.insert_batch(params, b), kind)
    return total / weight, outputs(config, params, forward)

  return jax.grad(loss, has_aux=True)(trainable)


class Said(NamedTuple):
  """What a case's program says of parameters; `merged` is None where they cannot be."""

  outputs: Any
  gradients: Any
  stepped: Any
  merged: Any


class Case:
  """A method on a model: as it starts, and after what training may do."""

  def __init__(self, name, kind, dtype):
    self.name, self.module, self.model = name, methods.get(name), model(kind, dtype)
    self.merges = getattr(self.module, "MERGES", True)
    self.params, self.mask = methods.init(KEY, self.model.params, spec(name))
    self.moved = moved(self.params, self.mask, FURTHER.get(name, NOISE))

  def split(self, params):
    return tree.split(params, self.mask)

  @functools.cached_property
  def gradients(self):
    """(trainable, frozen) to gradients and outputs; compiled within others, which trace it once."""
    return jax.jit(functools.partial(gradients, self.model.config))

  @functools.cached_property
  def program(self):
    """(trainable, frozen) to `Said`: the laws share one program, as compiling takes longer than all else."""
    optimiser, _ = optim.make(steps=3, learning_rate=1e-2, **methods.wrappers(spec(self.name), 3))

    def say(trainable, frozen):
      grads, y = self.gradients(trainable, frozen)
      updates, _ = optimiser.update(grads, optimiser.init(trainable), trainable)
      stepped = updates_lib.add(trainable, updates, KEY)
      return Said(y, grads, stepped, weights.merge(tree.join(trainable, frozen)) if self.merges else None)

    return jax.jit(say)

  def say(self, params):
    said = self.program(*self.split(params))
    return said._replace(outputs=np.asarray(said.outputs, np.float32))

  @functools.cached_property
  def said(self):
    """What is said of the parameters that have moved."""
    return self.say(self.moved)


case = functools.cache(Case)


@pytest.fixture(autouse=True)
def forget_earlier_methods(request, seen=set()):  # noqa: B006, it outlives a test on purpose
  """Thousands of programs in one process exceed the memory maps that Linux gives it, and XLA crashes."""
  seen.add(getattr(request.node, "callspec", None) and request.node.callspec.params.get("name"))
  if len(seen) > 4:
    case.cache_clear()
    compiled.cache_clear()
    jax.clear_caches()
    seen.clear()


@functools.cache
def compiled(config):
  return jax.jit(functools.partial(outputs, config))


def run(m, params):
  """Outputs of a model, as float32."""
  return np.asarray(compiled(m.config)(params), np.float32)


@every
def test_starts_as_the_model_it_adapts(name, kind, dtype):
  c = case(name, kind, dtype)
  if reason := getattr(c.module, "STARTS", None):
    assert isinstance(reason, str) and reason
    return
  # Rounding alone may differ where a method divides and multiplies by the same norm.
  atol = 1e-6 if dtype == "float32" else 0.02
  np.testing.assert_allclose(c.say(c.params).outputs, run(c.model, c.model.params), atol=atol)


@every
def test_gradients_are_finite_and_reach_every_trained_leaf(name, kind, dtype):
  grads = tree.flatten(case(name, kind, dtype).said.gradients)
  assert grads
  values = {k: np.asarray(g, np.float32) for k, g in grads.items()}
  assert all(np.isfinite(g).all() for g in values.values())
  assert not [k for k, g in values.items() if not g.any()]


@every
def test_a_step_changes_all_masked_leaves_and_no_others(name, kind, dtype):
  c = case(name, kind, dtype)
  after, before = tree.flatten(tree.join(c.said.stepped, c.split(c.moved)[1])), tree.flatten(c.moved)
  changed = {k for k, x in after.items() if not np.array_equal(x, before[k])}
  assert changed == {k for k, t in tree.flatten(c.mask).items() if t}


@every
def test_merged_weights_compute_the_same_and_unmerging_gives_the_base(name, kind, dtype):
  c = case(name, kind, dtype)
  if not getattr(c.module, "WHOLE", False):
    jax.tree.map(np.testing.assert_array_equal, weights.strip(c.moved), c.model.params)
  if not c.merges:
    with pytest.raises(errors.UserError, match="merged"):
      weights.merge(c.moved)
    return
  merged, ours = c.said.merged, c.said.outputs
  assert not any(weights.is_node(w) for w in jax.tree.leaves(merged, is_leaf=weights.is_node))
  assert tree.flatten(merged).keys() >= tree.flatten(c.model.params).keys()
  assert np.abs(ours - run(c.model, c.model.params)).max() > 1e-3 * np.abs(ours).max()
  np.testing.assert_allclose(run(c.model, merged), ours, atol=1e-5 if dtype == "float32" else 0.03)


@every
def test_saved_and_loaded_is_the_same(name, kind, dtype, tmp_path):
  c = case(name, kind, dtype)
  want = c.said.outputs
  if whole := getattr(c.module, "MODEL", False):
    want = run(c.model, c.said.merged)  # which is what is saved
    models.save(dataclasses.replace(c.model, params=c.moved), tmp_path)
    loaded = models.load(str(tmp_path), dtype=dtype).params
  else:
    adapter.save(c.model, c.moved, c.mask, spec(name), tmp_path)
    loaded = adapter.load(c.model, tmp_path)
  same_form = not whole and jax.tree.structure(loaded) == jax.tree.structure(c.moved)
  got = c.say(loaded).outputs if same_form else run(c.model, loaded)
  # In bfloat16 a model's float32 masters are rounded; more is lost where an adapter's form in the file has, in large
  # products that cancel, what ours takes as differences (OLoRA, PiSSA).
  atol = (ROUNDING if whole else 0.1) * np.abs(got).max() if dtype == "bfloat16" and not same_form else 2e-5
  np.testing.assert_allclose(got, want, atol=atol)


@pytest.mark.slow
@every
def test_eager_and_unrolled_is_as_compiled_and_scanned(name, kind, dtype):
  c = case(name, kind, dtype)
  eager = outputs(dataclasses.replace(c.model.config, scan=False), c.moved)
  # A compiled program keeps some results in float32 that operations one by one round.
  atol = 2e-5 if dtype == "float32" else ROUNDING * np.abs(c.said.outputs).max()
  np.testing.assert_allclose(np.asarray(eager, np.float32), c.said.outputs, atol=atol)


@pytest.mark.slow
@every
def test_two_members_under_vmap_are_two_runs(name, kind, dtype):
  c = case(name, kind, dtype)
  other, _ = methods.init(jax.random.key(1), c.model.params, spec(name))
  split = [c.split(moved(params, c.mask, NOISE, seed=i)) for i, params in enumerate((c.params, other))]
  trainable, frozen = ([s[i] for s in split] for i in (0, 1))
  # What differs between members is batched besides: frozen parts that a method draws at random.
  axes = jax.tree.map(lambda a, b: None if a is b or np.array_equal(a, b) else 0, *frozen)
  none = lambda x: x is None
  both = jax.tree.map(lambda ax, a, b: a if ax is None else np.stack([a, b]), axes, *frozen, is_leaf=none)
  step = jax.vmap(c.gradients, (0, axes))
  got = jax.tree.map(np.asarray, jax.jit(step)(jax.tree.map(lambda *xs: np.stack(xs), *trainable), both))
  for i, members in enumerate(split):
    said = c.say(tree.join(*members))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves((said.gradients, said.outputs)), strict=True):
      g, w = g[i].astype(np.float32), np.asarray(w, np.float32)
      np.testing.assert_allclose(g, w, atol=2e-5 if dtype == "float32" else ROUNDING * np.abs(w).max())


def shapes_of(model_type, hf, method, **choices):
  """(what a method trains, a whole tree) as shapes, nothing allocated."""
  config = dataclasses.replace(families.get(model_type).config({"model_type": model_type, **hf}), **choices)
  static = []

  def run(params):
    params, mask = methods.init(KEY, params, method)
    static.append(mask)
    return params

  params = jax.eval_shape(run, transformer.shapes(config))
  return tree.size(tree.split(params, static[0])[0])


ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
PRINTED = {
  # Hu et al. 2021, table 2 prints 0.3M, 0.8M; table 3 0.35M; table 5 18M; figures are those of the code.
  "RoBERTa base, r 8 on q, v": (
    294_912,
    "roberta",
    ROBERTA | dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    {"name": "lora", "rank": 8, "targets": "q,v"},
  ),
  "RoBERTa large, r 8 on q, v": (
    786_432,
    "roberta",
    ROBERTA | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    {"name": "lora", "rank": 8, "targets": "q,v"},
  ),
  "GPT-2 M, r 4 on q, v": (
    393_216,
    "gpt2",
    dict(vocab_size=50257, n_embd=1024, n_layer=24, n_head=16),
    {"name": "lora", "rank": 4, "targets": "q,v"},
  ),
  "GPT-3 175B, r 4 on q, v": (
    18_874_368,
    "gpt2",
    dict(vocab_size=50257, n_embd=12288, n_layer=96, n_head=96, n_positions=2048),
    {"name": "lora", "rank": 4, "targets": "q,v"},
  ),
  "GPT-3 175B, r 8 on q": (
    18_874_368,
    "gpt2",
    dict(vocab_size=50257, n_embd=12288, n_layer=96, n_head=96, n_positions=2048),
    {"name": "lora", "rank": 8, "targets": "q"},
  ),
  "Llama 2 13B, r 2 on q, k, v, o": (
    3_276_800,
    "llama",
    dict(vocab_size=32000, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824),
    {"name": "lora", "rank": 2, "targets": "q,k,v,o"},
  ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_counts_that_papers_print(name):
  expected, model_type, hf, method = PRINTED[name]
  choices = {"head": "classification"} if model_type == "roberta" else {}
  assert shapes_of(model_type, hf, method, **choices) == expected


V, D, L, N, K, H, F = 61, 16, 2, 4, 2, 4, 24  # of LLAMA
NORMS = (2 * L + 1) * D
ALL = 2 * V * D + L * (D * (2 * N + 2 * K) * H + 3 * D * F) + NORMS
PAIRS = D + N * H + D + F  # of one rank on q and up
LSTM = 4 * (D // 2) * (D + D // 2 + 1)  # a direction of a layer, half as wide as the embedding
# name: (keywords, count by the paper's definition).
FORMULAS = {
  "lora": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "rslora": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "lora_plus": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "pissa": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "olora": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "relora": ({"rank": 3, "targets": "q,up", "also": "norm/"}, L * 3 * PAIRS + NORMS),
  "dora": ({"rank": 3, "targets": "q,up"}, L * (3 * PAIRS + N * H + F)),
  "adalora": ({"init_r": 3, "target_r": 2, "targets": "q,up"}, L * 3 * (PAIRS + 2)),
  "lora_fa": ({"rank": 3, "targets": "q,up"}, L * 3 * (N * H + F)),
  "vera": ({"rank": 5, "targets": "q,up"}, L * (2 * 5 + N * H + F)),
  "loha": ({"rank": 3, "targets": "q"}, L * 2 * 3 * (D + N * H)),
  "lokr": ({"rank": 2, "targets": "up"}, L * (4 * 4 + 2 * (4 + 6))),  # D = 4 * 4, F = 4 * 6; the larger of low rank
  "intrinsic": ({"dimension": 40, "layer_scales": True}, 40),
  "ia3": ({}, L * (2 * K * H + F)),
  "bitfit": ({}, L * (N * H + 2 * K * H + D + 2 * F + D)),  # of all matrices: none had one
  "norms": ({}, NORMS),
  "houlsby": ({"size": 5}, L * 2 * (2 * 5 * D + 5 + D) + NORMS),
  "pfeiffer": ({"size": 5}, L * (2 * 5 * D + 5 + D)),
  "parallel": ({"size": 5}, L * (2 * 5 * D + 5 + D)),
  "prompt_tuning": ({"length": 7}, 7 * D),
  "p_tuning": ({"length": 7, "encoder": "lstm", "hidden": D // 2}, 7 * D + 2 * 2 * LSTM + 2 * (D * D + D)),
  "prefix_tuning": ({"length": 7}, L * 2 * 7 * K * H),
  "p_tuning_v2": ({"length": 7, "mlp": True}, 7 * D + D * D + D + (D + 1) * L * 2 * K * H),
  "full": ({}, ALL),
  "galore": ({"rank": 4}, ALL),
  "partial": ({"layers": 1, "also": "^norm/"}, D * (N + K + K + N) * H + 3 * D * F + 2 * D + D),
  "tokens": ({"ids": [1, 2, 3]}, 3 * D),
}


def test_every_method_has_a_formula():
  assert sorted(FORMULAS) == sorted(methods.names())


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_are_those_of_the_formulas(name):
  keywords, expected = FORMULAS[name]
  params, mask = methods.init(KEY, model("llama").params, {"name": name, **keywords})
  assert methods.size(params, mask) == expected


def test_a_list_of_methods_is_a_method():
  """LongLoRA's (Chen et al. 2023, section 3.3): LoRA on attention beside trained norms and embeddings."""
  m = model("llama")
  method = [
    {"name": "lora", "rank": 2, "targets": "q,k,v,o"},
    {"name": "full", "targets": [r"norm/scale$", r"^norm/scale$", r"embed/kernel$"]},
  ]
  params, mask = methods.init(KEY, m.params, method)
  trained = {k for k, t in tree.flatten(mask).items() if t}
  assert {k.rpartition("/")[2] for k in trained if "/attn/" in k} == {"a", "b"}
  assert {"embed/kernel", "norm/scale", "layers/attn_norm/scale", "layers/mlp_norm/scale"} <= trained
  # The other way round the matrices that were trained first still are, inside the nodes.
  params, mask = methods.init(KEY, m.params, [{"name": "full", "targets": "attn/q"}, {"name": "lora", "targets": "q"}])
  trained = {k for k, t in tree.flatten(mask).items() if t}
  assert trained == {f"layers/attn/q/kernel/{k}" for k in ("base", "a", "b")}
  assert methods.title(method) == "lora+full"


@pytest.mark.parametrize(
  "names, whole",
  [("full", True), ("full norms", True), ("relora", True), ("lora relora", True), ("lora", False), ("norms", False)]
  + [("lora full", False), ("full houlsby", False), ("bitfit partial", True), ("prompt_tuning full", False)],
)
def test_a_run_leaves_a_model_or_an_adapter(names, whole):
  """LongLoRA's embeddings and norms go into the adapter, as PEFT's modules_to_save do."""
  assert methods.leaves_model([{"name": n} for n in names.split()]) == whole


@pytest.mark.parametrize("others", [["houlsby"], ["ia3"], ["prompt_tuning"], ["norms"], ["tokens"]])
def test_lists_are_saved_whole(others, tmp_path):
  """In PEFT's form where it has a place for all of it, else in ours: nothing that was trained is left out."""
  m, method = model("llama"), [{"name": "lora"}, *({"name": n} for n in others)]
  params, mask = methods.init(KEY, m.params, method)
  params = moved(params, mask)
  adapter.save(m, params, mask, method, tmp_path)
  np.testing.assert_allclose(run(m, adapter.load(m, tmp_path)), run(m, params), atol=2e-5)


@pytest.mark.parametrize(
  "name, taken, refused",
  [
    ("rslora", "bias", "rslora"),
    ("lora_fa", "rslora", "tied"),
    ("lora_plus", "lr_ratio", "lora_bias"),
    ("pissa", "iterations", "init"),
    ("olora", "dropout", "bias"),
    ("dora", "init", "tied"),
    ("relora", "rslora", "init"),
  ],
)
def test_variants_take_the_keywords_of_lora_but_those_they_set(name, taken, refused):
  assert taken in methods.fields(name)
  with pytest.raises(errors.UserError, match=rf"unknown key config\.method\.{refused}"):
    methods.resolve({"name": name, refused: None})
