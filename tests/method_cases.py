"""Cases for the laws of methods: a method on a model of a family, in a dtype, over a base, with its program."""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import families, methods, models, tree, weights
from lora_jax.model import prompts, transformer
from lora_jax.training import optim, train
from lora_jax.weights import updates as updates_lib
from tests import packed, terms
from tests.noise import moved
from tests.pairwise import covering

KEY = jax.random.key(0)
LLAMA = dict(model_type="llama", vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64)
GPT2 = dict(model_type="gpt2", vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64)
BERT = dict(model_type="bert", vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
BERT |= dict(intermediate_size=24, max_position_embeddings=64)
MIXTRAL = LLAMA | dict(model_type="mixtral", num_local_experts=4)

# The factors. A level that is added to one of them meets every level of the others, but for what is refused.
MODELS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT, "mixtral": MIXTRAL}
DTYPES = ("float32", "bfloat16")
BASES = {
  "dense": lambda params: params,
  "packed": packed.packed,
}  # what a pretrained model's parameters are turned into
REFUSED = {(name, "packed") for name in ("full", "partial", "galore", "relora")} | {("parallel", "mixtral")}
ROWS = [
  row
  for row in itertools.product(methods.names(), MODELS, DTYPES, BASES)
  if not {*itertools.combinations(row, 2)} & REFUSED
]
CASES = covering(ROWS)

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
# What fits a model whose feed-forward layers are experts.
ATTENTION = {"targets": "attn/.*kernel$"}
MIXTURE = {"dora": ATTENTION, "ia3": {"feedforward": ""}, "houlsby": {"targets": "attn/o/kernel$"}}
MIXTURE |= {"pfeiffer": {"targets": "attn/o/kernel$"}}
NOISE = 0.05  # how far trained leaves are moved from where they start
STACKED = re.compile("layers/|prefix/[kv]$")  # names of leaves that have a part for each layer
FURTHER = {"ia3": 1.0}  # of methods whose effect on so small a model would be lost in rounding


@functools.cache
def model(kind, dtype="float32", base="dense"):
  hf = MODELS[kind]
  family = families.get(hf["model_type"])
  head = "classification" if kind == "bert" else "lm"
  config = dataclasses.replace(family.config(hf), dtype=dtype, head=head, n_labels=3)
  params = BASES[base](transformer.init(config, jax.random.key(7)))
  return models.Model(kind, config, params, None, dict(hf))


def spec(name, kind="llama"):
  return [{"name": name, **SETTINGS.get(name, {}), **(MIXTURE.get(name, {}) if kind == "mixtral" else {})}]


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

  def __init__(self, name, kind, dtype, base):
    self.name, self.dtype, self.module, self.spec = name, dtype, methods.get(name), spec(name, kind)
    self.model = model(kind, dtype, base)
    self.merges = getattr(self.module, "MERGES", True)
    self.params, self.mask = methods.init(KEY, self.model.params, self.spec)
    self.moved = self.move(self.params)

  def move(self, params, seed=1):
    """The parameters with noise on what is trained."""
    return moved(params, self.mask, FURTHER.get(self.name, NOISE), seed)

  def split(self, params):
    return tree.split(params, self.mask)

  @functools.cached_property
  def gradients(self):
    """(trainable, frozen) to gradients and outputs; compiled within others, which trace it once."""
    return jax.jit(functools.partial(gradients, self.model.config))

  @functools.cached_property
  def program(self):
    """(trainable, frozen) to `Said`: the laws share one program, as compiling takes longer than all else."""
    optimiser, _ = optim.make(steps=3, learning_rate=1e-2, **methods.wrappers(self.spec, 3))

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
  def started(self):
    """What is said of the parameters that the method starts with."""
    return self.say(self.params)

  @functools.cached_property
  def said(self):
    """What is said of the parameters that have moved."""
    return self.say(self.moved)

  @functools.cached_property
  def effect(self):
    """How far the moves have changed the largest of the outputs that they changed."""
    return np.abs(self.said.outputs - self.started.outputs).max()

  def close(self, got, want):
    """Asserts that outputs are the same up to rounding, which is small beside what the method does."""
    atol = min(0.1 * self.effect, 5e-6 if self.dtype == "float32" else np.inf)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)

  def run(self, params):
    return run(self.model, params)


case = functools.cache(Case)


@functools.cache
def compiled(config):
  return jax.jit(functools.partial(outputs, config))


def run(m, params):
  """Outputs of a model, as float32."""
  return np.asarray(compiled(m.config)(params), np.float32)


def forget():
  """Thousands of programs in one process exceed the memory maps that Linux gives it, and XLA crashes."""
  case.cache_clear()
  compiled.cache_clear()
  jax.clear_caches()


def layers_of(flat):
  """{name: numbers} of leaves {name: [...]}, with those that are stacked over layers as one for each layer."""
  out = {}
  for k, x in flat.items():
    x = np.asarray(x)
    out |= {f"{k}[{i}]": x[i] for i in range(len(x))} if STACKED.match(k) else {k: x}
  return out
