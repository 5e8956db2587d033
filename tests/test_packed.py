"""A packed weight of twenty lines (packed.py) is all that a new format needs: what the code owes it beside the laws of
methods, which test_methods.py holds it to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import PartitionSpec as P

from lora_jax import errors, methods, models, sharding, tree, weights
from lora_jax.formats import hf
from lora_jax.model import transformer
from lora_jax.training import optim, train
from lora_jax.weights import fused, grouped
from tests import packed
from tests.test_families import TOKENS

KEY = jax.random.key(0)
LLAMA = transformer.Config(64, 16, 2, 4, 4, 8, 32, dtype="float32")
FUSED = dataclasses.replace(LLAMA, fused=True, attn_bias="all")
MIXTRAL = dataclasses.replace(LLAMA, n_experts=4, pool="last")
EVERY = {"llama": LLAMA, "fused": FUSED, "mixtral": MIXTRAL}
PARTS = "^layers/attn/qkv/kernel/[qv]$"  # adapted apart


@struct.dataclass
class Naive(packed.Int8):
  """What goes wrong with a weight that unpacks itself and leaves the rest to autodiff."""

  def dot(self, spec, x, dtype=None):
    return weights.Weight.dot(self, spec, x, dtype)

  def grouped_dot(self, x, owner, keys=()):
    return grouped.dot(x, self.dense(), owner)


def make(config, kind=packed.Int8):
  params = packed.packed(transformer.init(config, KEY))
  swap = lambda w: kind(w.codes, w.scale) if isinstance(w, packed.Int8) else w
  return jax.tree.map(swap, params, is_leaf=weights.is_node)


def dense_of(params):
  """The same model without packed weights."""
  unpack = lambda w: weights.dense(w) if isinstance(w, packed.Int8) else w
  return jax.tree.map(unpack, params, is_leaf=lambda w: isinstance(w, packed.Int8))


def adapted(config, params, method="lora", **kw):
  return methods.init(KEY, params, {"name": method, "targets": "all-linear", **kw})


def loss(config, trainable, frozen, tokens=TOKENS):
  x = transformer.hidden(config, tree.join(trainable, frozen), tokens % config.vocab_size)[0]
  return jnp.square(x.astype(jnp.float32)).mean()


@pytest.mark.parametrize("name", EVERY)
def test_computes_and_learns_what_its_dense_weight_does(name):
  config = EVERY[name]
  params, mask = adapted(config, make(config))
  plain = dense_of(params)
  run = jax.jit(jax.value_and_grad(functools.partial(loss, config)))
  got, want = (
    run(*tree.split(p, m))
    for p, m in ((params, mask), (plain, tree.map_named(lambda k, _: k in flags(params, mask), plain)))
  )
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  theirs = tree.flatten(want[1])
  for k, g in tree.flatten(got[1]).items():
    size = np.abs(theirs[k]).max()
    np.testing.assert_allclose(g, theirs[k], atol=1e-5 * max(size, 1e-6), err_msg=k)
  assert max(np.abs(g).max() for g in theirs.values()) > 1e-3


def flags(params, mask):
  return {k for k, m in tree.flatten(mask).items() if m}


def residuals(config, params, mask):
  trainable, frozen = tree.split(params, mask)
  few = jnp.ones((1, 4), jnp.int32)
  return jax.tree.leaves(jax.vjp(lambda t: loss(config, t, frozen, few), trainable)[1])


@pytest.mark.parametrize("scan", [True, False])
def test_no_dense_copy_is_kept_for_the_backward_pass(scan):
  config = dataclasses.replace(LLAMA, d_model=64, head_dim=16, d_ff=128, scan=scan)
  of_a_matrix = config.d_model * config.d_ff

  def dense_copies(kind):
    kept = residuals(config, *adapted(config, make(config, kind), rank=1))
    return [x.shape for x in kept if jnp.issubdtype(x.dtype, jnp.floating) and x.size >= of_a_matrix]

  assert not dense_copies(packed.Int8)
  assert dense_copies(Naive)


def test_a_scanned_step_needs_no_memory_for_a_dense_stack():
  config = dataclasses.replace(LLAMA, n_layers=8, d_model=64, head_dim=16, d_ff=256)

  def temporary(kind):
    trainable, frozen = tree.split(*adapted(config, make(config, kind), rank=1))
    step = jax.jit(jax.grad(functools.partial(loss, config, tokens=jnp.ones((1, 4), jnp.int32))))
    return step.lower(trainable, frozen).compile().memory_analysis().temp_size_in_bytes

  stack = tree.nbytes(dense_of(make(config))["layers"])
  assert temporary(Naive) > stack > 2 * temporary(packed.Int8)


def test_members_share_what_is_unpacked():
  params, mask = adapted(LLAMA, make(LLAMA))
  trainable, frozen = tree.split(params, mask)
  members = jax.tree.map(lambda x: jnp.stack([x] * 3), trainable)
  run = jax.vmap(jax.grad(functools.partial(loss, LLAMA)), in_axes=(0, None))
  large = 3 * LLAMA.d_model * LLAMA.d_ff
  text = jax.jit(run).lower(members, frozen).as_text()
  assert "xi8>" in text and f"3x{LLAMA.d_model}x{LLAMA.d_ff}xf32" not in text, large


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for p in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      inner = getattr(p, "jaxpr", p)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


@pytest.mark.parametrize("kind, dense", [(packed.Int8, False), (Naive, True)])
def test_experts_stay_packed(kind, dense):
  """One expert's matrix at a time is dense."""
  trainable, frozen = tree.split(*adapted(MIXTRAL, make(MIXTRAL, kind)))
  jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, MIXTRAL)))(trainable, frozen)
  E, D, F = MIXTRAL.n_experts, MIXTRAL.d_model, MIXTRAL.d_ff
  made = [v.aval for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
  shapes = {a.shape[-3:] for a in made if jnp.issubdtype(a.dtype, jnp.floating)}
  assert ((E, D, F) in shapes or (E, F, D) in shapes) == dense


def test_parts_of_a_fused_matrix_are_cut_and_joined_exactly():
  params = make(FUSED)
  split = fused.split(params, ["layers/attn/qkv/kernel"])
  qkv = split["layers"]["attn"]["qkv"]["kernel"]
  whole = params["layers"]["attn"]["qkv"]["kernel"]
  assert {k: p.shape for k, p in qkv.parts.items()} == dict.fromkeys("qkv", (2, 16, 4, 8))
  jax.tree.map(np.testing.assert_array_equal, weights.base(qkv), whole)
  np.testing.assert_array_equal(weights.dense(qkv), weights.dense(whole))


@pytest.mark.parametrize("name", EVERY)
def test_counts_what_it_stands_for(name):
  params, mask = adapted(EVERY[name], make(EVERY[name]))
  plain = transformer.init(EVERY[name], KEY)
  assert weights.n_params(weights.strip(params)) == tree.size(plain)
  assert methods.size(params, mask) == methods.size(*adapted(EVERY[name], plain))


@pytest.mark.parametrize("method", ["full", "partial", "galore", "relora"])
def test_methods_that_train_pretrained_weights_refuse_it(method):
  with pytest.raises(errors.UserError, match=r"layers/attn/\w/kernel is (packed|a Int8)"):
    methods.init(KEY, make(LLAMA), {"name": method})


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_tensor_is_placed_like_its_weight(name):
  """On 2 x 4 devices: codes like the dense weight, a scale like its outputs, factors of LoRA like inputs and outputs,
  moments like what they are of."""
  config, mesh = EVERY[name], sharding.make_mesh(1, 2, 4)
  params, mask = adapted(config, make(config), dropout=0.1)
  place = weights.placer(params, mesh)
  optimiser = optim.make(steps=10, learning_rate=0.1)[0]
  state = train.init_state(tree.split(params, mask)[0], optimiser)
  both = tree.flatten(sharding.put({"params": params, "state": state}, place))
  where = {k: x.sharding for k, x in both.items() if isinstance(x, jax.Array)}

  def check(end, spec):
    found = {k: s for k, s in where.items() if k.endswith(end)}
    assert found, end
    for k, s in found.items():
      assert s.is_equivalent_to(jax.NamedSharding(mesh, P(*spec)), both[k].ndim), (k, s.spec, spec)

  check("attn/q/kernel/base/codes", (None, "fsdp", "tensor", None))
  check("attn/q/kernel/base/scale", (None, None, "tensor", None))
  check("attn/o/kernel/base/codes", (None, "tensor", None, "fsdp"))
  check("attn/q/kernel/a", (None, "fsdp", None))
  check("attn/q/kernel/b", (None, None, "tensor", None))
  check("attn/o/kernel/a", (None, "tensor", None, None))
  check("attn/q/kernel/scale", ())
  up, lead = ("moe/up", (None, None)) if config.n_experts else ("mlp/up", (None,))
  check(f"{up}/kernel/base/codes", (*lead, "fsdp", "tensor"))
  check(f"{up}/kernel/base/scale", (*lead, None, "tensor"))
  check(f"{up}/kernel/b", (*lead, None, "tensor"))
  moments = [k for k in where if "/mu/" in k and k.endswith(f"{up}/kernel/a")]
  assert moments and where[moments[0]].is_equivalent_to(where[f"params/layers/{up}/kernel/a"], 4)
  with jax.set_mesh(mesh):
    got = jax.jit(functools.partial(loss, config))(*tree.split(sharding.put(params, place), mask))
  np.testing.assert_allclose(got, loss(config, *tree.split(params, mask)), rtol=1e-5)


class Watched(hf.Tensors):
  """Tensors of a file; each time one is read, no new array on a device may have a forbidden shape."""

  forbidden, before = frozenset(), ()

  def read(self, name):
    old = set(map(id, self.before))
    new = [x for x in jax.live_arrays() if id(x) not in old]
    alive = {x.shape for x in new if jnp.issubdtype(x.dtype, jnp.floating)}
    assert not alive & self.forbidden, alive & self.forbidden
    return super().read(name)


@pytest.mark.parametrize("mesh", [None, (1, 2, 4)])
def test_a_model_is_packed_tensor_by_tensor_while_it_is_loaded(tmp_path, monkeypatch, mesh):
  hf_config = dict(model_type="mixtral", vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4)
  hf_config |= dict(num_key_value_heads=4, head_dim=8, intermediate_size=32, num_local_experts=4)
  config = dataclasses.replace(MIXTRAL, n_layers=3)
  models.save(models.Model("m", config, transformer.init(config, KEY), None, hf_config), tmp_path)
  want = packed.packed(models.load(tmp_path, dtype="float32").params)
  forbidden = {s.shape for k, s in tree.flatten(transformer.shapes(config)).items() if "layers/" in k and "kernel" in k}
  monkeypatch.setattr(Watched, "forbidden", frozenset(forbidden))
  monkeypatch.setattr(Watched, "before", jax.live_arrays())
  monkeypatch.setattr(hf, "Tensors", Watched)
  place = {} if mesh is None else {"sharding": sharding.Placer(sharding.make_mesh(*mesh))}
  got = models.load(tmp_path, dtype="float32", quantise=packed.pack, **place).params
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  if mesh:
    for k, x in tree.flatten(got).items():
      assert x.sharding.is_equivalent_to(weights.placer(want, sharding.make_mesh(*mesh))(k, x.shape), x.ndim), k
