"""The bridges to Flax: layers run beside their adapters, and what has no such form is merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import lora_jax
from lora_jax import bridges
from tests.test_adapt import IDS, KERNELS, KEY, MLP, RULES, fast, noisy


def sub_jaxprs(jaxpr):
  yield jaxpr
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      for v in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(v, "jaxpr", v)
        if hasattr(inner, "eqns"):
          yield from sub_jaxprs(inner)


def intermediates(fn, *args):
  """(operation, shape) of all that a function computes; views and kernels turned round do not count."""
  closed = jax.make_jaxpr(fn)(*args)
  views = (
    "reshape",
    "pjit",
    "jit",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "checkpoint",
    "stop_gradient",
    "rev",
  )
  return {
    (eqn.primitive.name, v.aval.shape)
    for jaxpr in sub_jaxprs(closed.jaxpr)
    for eqn in jaxpr.eqns
    for v in eqn.outvars
    if eqn.primitive.name not in views
  }


class Wide(nn.Module):
  """Every kind of layer, with kernels larger than anything that is computed from 3 tokens."""

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(50, 24)
    x = embed(ids)
    x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
    x = nn.Dense(24)(nn.Dense(32)(x))
    return embed.attend(nn.Conv(24, (3,))(x))


class WideNNX(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(50, 24, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(2, 24, 24, rngs=rngs, decode=False)
    self.up, self.down = nnx.Linear(24, 32, rngs=rngs), nnx.Linear(32, 24, rngs=rngs)
    self.conv = nnx.Conv(24, 24, (3,), rngs=rngs)

  def __call__(self, ids):
    return self.embed.attend(self.conv(self.down(self.up(self.attn(self.embed(ids))))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_the_gradient_beside_layers_has_nothing_of_the_size_of_a_kernel(kind):
  ids = jnp.arange(3)[None]
  rules = [(KERNELS, {"name": "lora", "rank": 2})]
  if kind == "linen":
    model = Wide()
    params = model.init(KEY, ids)["params"]
    bridged = bridges.linen(model, params, rules)
    generic = lora_jax.adapt(lambda p, x: model.apply({"params": p}, x), params, rules)
  else:
    model = WideNNX(nnx.Rngs(0))
    bridged = bridges.nnx(model, rules)
    generic = None
  adapter = bridged.init(KEY)
  size = lambda apply: max(
    int(np.prod(shape)) for _, shape in intermediates(jax.grad(lambda a: jnp.sum(apply(a, ids) ** 2)), adapter)
  )
  assert size(bridged.apply) <= 3 * 50  # logits of 3 tokens; kernels have 24 * 24 numbers and more
  if generic:
    assert size(generic.apply) >= 50 * 24


def test_dora_runs_beside_dense_layers():
  """Only its factors are trained and no merged weight is formed: |W + AB| comes from products with A."""
  model = nn.Dense(40)
  params = model.init(KEY, jnp.ones((1, 30)))["params"]
  bridged = bridges.linen(model, params, [("kernel", {"name": "dora", "rank": 2})])
  loss = lambda a: jnp.sum(bridged.apply(a, jnp.ones((3, 30))) ** 2)
  assert max(int(np.prod(s)) for _, s in intermediates(jax.grad(loss), bridged.init(KEY))) < 30 * 40


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(8)(nn.tanh(nn.Dense(6)(x))), None


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.remat(Layer, prevent_cse=False)
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]


@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dora", "ia3"))])
def test_layers_stacked_by_scan(name):
  model, x = Scanned(), jax.random.normal(KEY, (2, 8))
  params = model.init(KEY, x)["params"]
  spec = {"name": name, "stacked": True} | ({} if name == "ia3" else {"rank": 2})
  bridged = bridges.linen(model, params, [("kernel", spec)])
  adapter = noisy(bridged.init(KEY))

  @fast
  def run(adapter):
    grads = jax.grad(lambda a: jnp.sum(bridged.apply(a, x) ** 2))(adapter)
    return bridged.apply(adapter, x), *(model.apply({"params": p}, x) for p in (bridged.merge(adapter), params)), grads

  got, expected, base, grads = run(adapter)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  assert np.abs(expected - base).max() > 1e-2
  assert all(np.abs(g).sum(tuple(range(1, g.ndim))).all() for g in jax.tree.leaves(grads))


class Twice(nn.Dense):
  """A layer that does not use what it inherits."""

  @nn.compact
  def __call__(self, x):
    return 2 * x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))


class ScaledEmbed(nn.Embed):
  def __call__(self, ids):
    return 3 * super().__call__(ids)


class Odd(nn.Module):
  """Layers that the bridge must leave to themselves, or call in the way they ask for."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, precision="highest", dot_general=lambda *a, **k: 2 * jax.lax.dot_general(*a, **k))(x)
    x = nn.Conv(4, (3,), feature_group_count=2)(x)
    x = nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)).at[0].set(0))(x)
    x = nn.ConvTranspose(4, (3,))(x)
    x = nn.DenseGeneral(4, axis=1)(x)
    x = x @ self.param("own_kernel", nn.initializers.normal(), (4, 5))
    x = nn.remat(nn.Dense)(4)(Twice(4)(x)) + ScaledEmbed(5, 4)(jnp.arange(4))
    x = nn.DenseGeneral((2, 3), axis=-1)(x)
    shared = nn.Dense(3)
    return nn.Dense(7, dtype=jnp.float16)(shared(shared(x)))


ODD = [
  {"name": "lora", "rank": 2},
  *(pytest.param(m, marks=pytest.mark.slow) for m in ({"name": "pissa", "rank": 1}, "ia3")),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", ODD)
def test_layers_that_are_not_plain(method):
  model, x = Odd(), jax.random.normal(KEY, (2, 6, 4))
  params = fast(lambda: model.init(KEY, x))()["params"]
  bridged = bridges.linen(model, params, [(KERNELS, method)])
  run = fast(lambda a: (bridged.apply(a, x), model.apply({"params": bridged.merge(a)}, x)))
  got, expected = run(noisy(bridged.init(KEY)))
  assert got.dtype == expected.dtype == jnp.float16
  scale = float(np.abs(expected).max())
  np.testing.assert_allclose(np.float32(got) / scale, np.float32(expected) / scale, atol=2e-3)


def test_stacked_layers_of_nnx_are_merged():
  make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0, out_axes=0)
  run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

  class Model(nnx.Module):
    def __init__(self):
      self.layers = make(nnx.Rngs(0).split(3))

    def __call__(self, x):
      return run(x, self.layers)

  model, x = Model(), jnp.ones((2, 4))
  bridged = bridges.nnx(model, [("kernel", {"name": "lora", "rank": 2, "stacked": True})])
  adapter = noisy(bridged.init(KEY))
  np.testing.assert_allclose(bridged.apply(adapter, x), bridged.merge(adapter)(x), atol=1e-5)
  assert np.abs(bridged.apply(adapter, x) - model(x)).max() > 1e-2


@pytest.mark.slow
def test_an_nnx_model_is_left_as_it_is():
  model = MLP(nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  types = [type(m) for _, m in nnx.iter_modules(model)]
  bridged = bridges.nnx(model, RULES["lora"])
  fast(bridged.apply)(noisy(bridged.init(KEY)), IDS)
  jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  assert types == [type(m) for _, m in nnx.iter_modules(model)]
  assert model.layers[0].dot_general is jax.lax.dot_general
