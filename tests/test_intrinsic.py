"""Intrinsic dimension: the Fastfood projection, what is shared by the layers, and d90."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter
from lora_jax.merging import lowrank
from lora_jax.methods import fastfood, intrinsic
from lora_jax.model import transformer
from tests.noise import moved
from tests.test_dora import apply

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
PROJECT = jax.jit(fastfood.project, static_argnums=2)
DELTA = jax.jit(lambda w: w.delta())


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def columns(key, d, shape):
  """P [n, d], from what it makes of the unit vectors."""
  return np.stack([np.asarray(PROJECT(key, z, shape)).ravel() for z in np.eye(d, dtype=np.float32)], 1)


def nodes(params):
  flat = tree.flatten(weights.bind(params), is_leaf=weights.is_node)
  return {k: w for k, w in flat.items() if weights.is_node(w)}


def changes(params):
  """What all nodes add, as one vector of float64."""
  return np.concatenate([np.asarray(DELTA(w), np.float64).ravel() for w in nodes(params).values()])


@pytest.mark.parametrize("q", [1, 2, 8, 64, 128, 2048])
def test_transform_is_the_product_with_scipys_matrix(q):
  h = pytest.importorskip("scipy.linalg").hadamard(q)
  np.testing.assert_array_equal(fastfood.hadamard(q), h)
  x = np.random.default_rng(0).normal(size=(q, 2, 3)).astype(np.float32)
  want = np.einsum("qij,qr->ijr", x.astype(np.float64), h)
  np.testing.assert_allclose(fastfood.transform(x), want, atol=1e-5 * np.sqrt(q) * 10)


def test_projection_is_linear_and_literally_h_g_pi_h_b():
  """Against dense matrices in float64, for a d that is no power of two and an end that fills no block."""
  d, shape, q = 11, (7, 9), 16
  p = columns(KEY, d, shape)
  z = np.random.default_rng(1).normal(size=d).astype(np.float32)
  np.testing.assert_allclose(PROJECT(KEY, z, shape).ravel(), p @ z, atol=1e-5)
  first, words = (np.asarray(x) for x in fastfood._words(KEY, q, 4))
  b = np.where(first % 2, -1.0, 1.0)
  pi = np.eye(q)[np.argsort(first // 2)]
  g, h = np.asarray(fastfood._gaussian(words), np.float64).T, fastfood.hadamard(q).astype(np.float64)
  want = np.concatenate([h @ np.diag(row) @ pi @ h @ np.diag(b) for row in g])[:63, :d] / np.sqrt(q)
  np.testing.assert_allclose(p, want, atol=1e-5)
  assert sorted(np.argmax(pi, 1)) == list(range(q)) and set(b) == {-1.0, 1.0}


@pytest.mark.parametrize("d, shape", [(1, (40, 50)), (20, (64, 64)), (100, (30, 101)), (64, (128, 40))])
def test_columns_are_nearly_orthonormal(d, shape):
  """As near as those of a dense Gaussian matrix: inner products within a few 1 / sqrt(n) of 0, norms of 1."""
  n = np.prod(shape)
  p = columns(KEY, d, shape) / np.sqrt(n)
  gram = p.T @ p
  assert np.abs(gram - np.eye(d)).max() < 6 / np.sqrt(n)
  assert np.linalg.matrix_rank(p) == d
  np.testing.assert_allclose(p.std(), 1 / np.sqrt(n), rtol=0.1)


def test_gaussian_numbers_are_so():
  x = np.asarray(fastfood._gaussian(fastfood._words(KEY, 1024, 101)[1]), np.float64)
  assert np.isfinite(x).all()
  moments = [(x**k).mean() for k in (1, 2, 3, 4)]
  np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.06)
  assert 4 < np.abs(x).max() < 5
  assert np.abs(np.corrcoef(x.T) - np.eye(102)).max() < 0.16  # 5 standard deviations


def test_rows_of_a_small_matrix_of_large_d_are_random_rows():
  """A matrix smaller than a block: its entries have the variance of all."""
  z = np.random.default_rng(1).normal(size=300).astype(np.float32)
  keys = jax.random.split(KEY, 400)
  y = jax.vmap(lambda k: PROJECT(k, z, (5, 4)))(keys)
  np.testing.assert_allclose((np.asarray(y) ** 2).mean(0), (z**2).sum(), rtol=0.5)
  np.testing.assert_allclose((np.asarray(y) ** 2).mean(), (z**2).sum(), rtol=0.06)


@pytest.mark.slow
def test_model_wide_projection_keeps_lengths_and_angles(base):
  """|P z| = |z| up to a few 1 / sqrt(n), over all matrices together."""
  params, _ = intrinsic.init(KEY, base, dimension=50)
  place = lambda z: params | {"shared": {"intrinsic": {"z": jnp.asarray(z, jnp.float32)}}}
  z, other = np.random.default_rng(0).normal(size=(2, 50))
  other -= z * (z @ other) / (z @ z)
  a, b = changes(place(z)), changes(place(other))
  n = sum(w.size for k, w in tree.flatten(base["layers"]).items() if k.endswith("kernel"))
  assert a.size == n
  np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(z), rtol=4 / np.sqrt(n))
  assert abs(a @ b) < 4 / np.sqrt(n) * np.linalg.norm(a) * np.linalg.norm(b)
  np.testing.assert_allclose(changes(place(z + other)), a + b, atol=1e-5)


def test_every_matrix_and_layer_has_rows_of_its_own_that_depend_on_nothing_else(base):
  """Not on which others are adapted, on how many layers there are, or on the order of the tree."""
  values = lambda params: {k: np.asarray(DELTA(w) / w.scale.max()) for k, w in nodes(moved(*params, size=1.0)).items()}
  every = values(intrinsic.init(KEY, base, dimension=20))
  rows = [x[i].ravel()[:100] for x in every.values() for i in range(3)]
  assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.6
  some = values(intrinsic.init(KEY, dict(reversed(base.items())), dimension=20, targets="up,q"))
  for k, x in some.items():
    np.testing.assert_allclose(x, every[k], atol=1e-4)
  short = jax.tree.map(lambda x: x[:2], base["layers"])
  fewer = values(intrinsic.init(KEY, base | {"layers": short}, dimension=20, targets="up"))
  np.testing.assert_allclose(fewer["layers/mlp/up/kernel"], every["layers/mlp/up/kernel"][:2], atol=1e-4)
  again = values(intrinsic.init(jax.random.key(1), base, dimension=20, targets="up"))["layers/mlp/up/kernel"]
  assert abs(np.corrcoef(again.ravel(), every["layers/mlp/up/kernel"].ravel())[0, 1]) < 0.2


@pytest.mark.slow
def test_projection_is_that_of_any_mesh_and_of_a_compiled_program(base):
  params = moved(*intrinsic.init(KEY, base, dimension=30), size=1.0)
  want = apply(CONFIG, params, TOKENS)
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
  split = tree.map_named(
    lambda k, x: place(x, None, None, "tensor") if k.endswith("up/kernel/base") else place(x), params
  )
  tokens = place(np.concatenate([TOKENS, TOKENS]), "data")
  got = jax.jit(functools.partial(transformer.apply, CONFIG))(split, tokens)
  np.testing.assert_allclose(got[:2], want, atol=1e-5)
  for w, s in zip(nodes(params).values(), nodes(split).values(), strict=True):
    np.testing.assert_allclose(DELTA(s), DELTA(w), atol=1e-6)


@pytest.mark.slow
def test_starts_as_the_model_and_trains_d_numbers(base):
  params, mask = intrinsic.init(KEY, base, dimension=40)
  np.testing.assert_array_equal(apply(CONFIG, params, TOKENS), apply(CONFIG, base, TOKENS))
  assert [k for k, m in tree.flatten(mask).items() if m] == ["shared/intrinsic/z"]
  assert methods.size(params, mask) == 40
  stored = sum(x.size for k, x in tree.flatten(params).items() if "seed" in k)
  assert stored == 7 * 3 * 2  # two words a matrix
  said, mask = intrinsic.init(KEY, base, dimension=40, layer_scales=True)
  assert methods.size(said, mask) == 40
  assert said["shared"]["intrinsic"]["z"].shape == (37,) and said["shared"]["intrinsic"]["scale"].shape == (3,)
  np.testing.assert_array_equal(apply(CONFIG, said, TOKENS), apply(CONFIG, base, TOKENS))


def test_a_lambda_scales_all_matrices_of_its_layer(base):
  targets = ["layers/[02]/", "layers/1/attn/q"]
  params = moved(*intrinsic.init(KEY, base, dimension=40, targets=targets, layer_scales=True), size=1.0)
  params["shared"]["intrinsic"]["scale"] = jnp.array([1.0, 1.0, 1.0])
  before = nodes(params)
  order = np.asarray(before["layers/attn/q/kernel"].layer)
  assert sorted(order) == [0, 1, 2]
  params["shared"]["intrinsic"]["scale"] = jnp.array([2.0, -3.0, 0.5])
  factor = params["shared"]["intrinsic"]["scale"][order]
  for k, w in nodes(params).items():
    change = np.asarray(DELTA(before[k]))
    np.testing.assert_allclose(DELTA(w), change * np.asarray(factor).reshape(3, *(1,) * (change.ndim - 1)), atol=1e-5)
    if k != "layers/attn/q/kernel":
      assert change[0].any() and not change[1].any() and change[2].any()


@pytest.mark.slow
def test_head_and_encoder_have_lambdas_of_their_own():
  kw = dict(encoder_layers=2, position="relative", norm="rms", tied=False, dtype="float32")
  config = transformer.Config(50, 16, 2, 4, 4, 4, 24, **kw)
  params = transformer.init(config, KEY)
  said, mask = intrinsic.init(KEY, params, targets="q,head", layer_scales=True)
  assert said["shared"]["intrinsic"]["scale"].shape == (2 + 2 + 1,)
  layer = lambda *path: np.asarray(functools.reduce(lambda p, k: p[k], path, said).layer).ravel().tolist()
  found = [layer(*p, "kernel") for p in (("layers", "attn", "q"), ("layers", "cross", "q"), ("head",))]
  found.append(layer("encoder", "layers", "attn", "q", "kernel"))
  assert found[0] == found[1] and sorted(found[0] + found[2] + found[3]) == [0, 1, 2, 3, 4]
  said = moved(said, mask, size=1.0)
  run = jax.jit(lambda p: transformer.apply(config, p, TOKENS, encoded=transformer.encode(config, p, TOKENS)))
  assert np.abs(run(said) - run(params)).max() > 1e-2
  np.testing.assert_allclose(run(said), run(weights.merge(said)), atol=1e-4)


@pytest.mark.slow
def test_gradients_are_those_of_a_dense_projection(base):
  """And they go through all layers under scan to one z."""
  params, mask = intrinsic.init(KEY, base, dimension=12, layer_scales=True, targets="q,down")
  params = moved(params, mask, size=1.0)
  shared = params["shared"]["intrinsic"]
  out = np.random.default_rng(0).normal(size=(2, 12, 50)).astype(np.float32)

  def loss(shared, params):
    return jnp.sum(transformer.apply(CONFIG, params | {"shared": {"intrinsic": shared}}, TOKENS) * out)

  got = jax.jit(jax.grad(loss))(shared, params)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(transformer.apply(CONFIG, p, TOKENS) * out)))(weights.merge(params))
  want = {"z": np.zeros(9), "scale": np.zeros(3)}
  for k, w in nodes(params).items():
    g = tree.flatten(grads)[k]
    for i in range(3):
      key = jax.random.wrap_key_data(w.seed[i], impl="threefry2x32")
      p = columns(key, 9, w.shape[1:]) * float(w.scale[i])
      back = p.T.astype(np.float64) @ np.asarray(g[i], np.float64).ravel()
      want["z"] += float(shared["scale"][w.layer[i]]) * back
      want["scale"][int(w.layer[i])] += back @ np.asarray(shared["z"])
  for k in want:
    np.testing.assert_allclose(got[k], want[k], rtol=0, atol=1e-4 * np.abs(want[k]).max())


def test_no_change_is_kept_for_the_backward_pass():
  """In all layers together that would be a second model, in float32."""
  params, _ = intrinsic.init(KEY, {"layers": {"up": {"kernel": jnp.zeros((3, 96, 80))}}}, dimension=16)
  node = jax.tree.map(lambda x: x[0], params["layers"]["up"]["kernel"])
  run = lambda z, x: weights.bind(node, {"intrinsic": {"z": z}}).change("BD,DF->BF", x)
  _, backward = jax.vjp(run, jnp.ones(16), jnp.ones((2, 96)))
  assert 0 < sum(x.size for x in jax.tree.leaves(backward)) < 96 * 80 / 4
  dz, dx = backward(jnp.ones((2, 80)))
  delta = lambda z: weights.bind(node, {"intrinsic": {"z": z}}).layer_delta()
  np.testing.assert_allclose(dz, 2 * jax.grad(lambda z: delta(z).sum())(jnp.ones(16)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dx, jnp.tile(delta(jnp.ones(16)).sum(1), (2, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_small_changes_of_bfloat16_weights_are_not_rounded_away(base):
  """As they would be if the sum were: the change is a product of its own, and its master is float32."""
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
  params = moved(*intrinsic.init(KEY, half, dimension=20), size=1e-4)
  node = jax.tree.map(lambda x: x[0], nodes(params)["layers/mlp/up/kernel"].replace(shared=None))
  node = weights.bind(node, params["shared"])
  assert params["shared"]["intrinsic"]["z"].dtype == jnp.float32
  x = jax.random.normal(KEY, (2, 3, 16))
  delta = node.layer_delta()
  assert delta.dtype == jnp.float32 and np.abs(delta).max() < 1e-4
  y = node.change("BTD,DF->BTF", x.astype(jnp.bfloat16), jnp.float32)
  want = jnp.einsum("BTD,DF->BTF", x, delta)
  np.testing.assert_allclose(y, want, rtol=0, atol=0.01 * np.abs(want).max())
  np.testing.assert_array_equal(weights.merge(params)["layers"]["mlp"]["up"]["kernel"].dtype, jnp.bfloat16)


def test_beside_other_methods(base):
  """On top of LoRA, whose shared arrays VeRA's may be besides; both are merged."""
  method = [{"name": "lora", "targets": "q", "rank": 2}, {"name": "vera", "targets": "v", "rank": 3}]
  method += [{"name": "intrinsic", "targets": "q,v,up", "dimension": 30}]
  params, mask = methods.init(KEY, base, method)
  assert {k.rpartition("/")[2] for k, m in tree.flatten(mask).items() if m} == {"a", "b", "d", "z"}
  params = moved(params, mask)
  np.testing.assert_allclose(apply(CONFIG, weights.merge(params), TOKENS), apply(CONFIG, params, TOKENS), atol=1e-4)
  fused = transformer.init(transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True, fused=True), KEY)
  params, mask = intrinsic.init(KEY, fused, dimension=30, targets="q,up")
  assert set(nodes(params)) >= {"layers/attn/qkv/kernel", "layers/mlp/gate_up/kernel"}
  assert sum(isinstance(w, intrinsic.Intrinsic) for w in nodes(params)["layers/attn/qkv/kernel"].parts.values()) == 1


@pytest.mark.parametrize("layer_scales", [False, True])
def test_saved_and_loaded_bit_for_bit(tmp_path, base, layer_scales):
  """The words that the projection follows from are saved: it does not depend on a seed of the run."""
  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  method = [{"name": "intrinsic", "dimension": 25, "layer_scales": layer_scales}]
  params, mask = methods.init(jax.random.key(5), base, method)
  params = moved(params, mask)
  adapter.save(model, params, mask, method, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path), params)
  saved = (tmp_path / "adapter_model.safetensors").stat().st_size
  assert saved < 6000  # mostly the header of 7 matrices


@pytest.mark.slow
def test_as_lora(base):
  """Of full rank, since a random matrix is; of a smaller one the best of that rank."""
  params = moved(*intrinsic.init(KEY, base, dimension=30, targets="q,down"), size=1.0)
  made, report = lowrank.to_lora(params, rank=50)
  np.testing.assert_allclose(apply(CONFIG, made, TOKENS), apply(CONFIG, params, TOKENS), atol=1e-4)
  assert "shared" not in made and {fit.ranks for fit in report.values()} == {(16, 16, 16)}
  made, report = lowrank.to_lora(params, rank=4)
  assert all(0.2 < fit.error < 0.9 for fit in report.values())


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"dimension": 0}, "at least 1"),
    ({"dimension": 2.5}, "whole number"),
    ({"dimension": "20"}, "whole number"),
    ({"dimension": True}, "whole number"),
    ({"dimension": 10**6}, "at most the 5,760 numbers"),
    ({"dimension": 3, "layer_scales": True}, "more than the 3 layers"),
    ({"targets": "w_q"}, "matches nothing"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    intrinsic.init(KEY, base, **kw)


def test_a_second_one_is_refused_and_unbound_nodes_say_so(base):
  params, _ = intrinsic.init(KEY, base, targets="q")
  with pytest.raises(errors.UserError, match="already"):
    intrinsic.init(KEY, params, targets="v")
  with pytest.raises(ValueError, match="bind"):
    weights.dense(params["layers"]["attn"]["q"]["kernel"])


def test_d90_interpolates_in_log_d():
  dims, accuracy = [10, 100, 1000, 10000], [0.5, 0.6, 0.8, 0.85]
  # 90% of 0.8 is 0.72: 0.6 of the way from 0.6 to 0.8.
  assert intrinsic.d90(dims, accuracy, 0.8) == pytest.approx(10**2.6)
  assert intrinsic.d90(dims[::-1], accuracy[::-1], 0.8) == pytest.approx(10**2.6)
  # Above a chance of 0.5: 0.5 + 0.9 * 0.3 = 0.77.
  assert intrinsic.d90(dims, accuracy, 0.8, base=0.5) == pytest.approx(10 ** (2 + 0.17 / 0.2))
  assert intrinsic.d90(dims, accuracy, 0.8, share=0.75) == pytest.approx(100)
  assert intrinsic.d90(dims, accuracy, 0.5) == 10
  assert intrinsic.d90(dims, accuracy, 0.99) is None
  assert intrinsic.d90([], [], 0.8) is None
  # Losses, with the one before training as the base.
  assert intrinsic.d90([10, 1000], [3.0, 1.0], 1.0, base=5.0) == pytest.approx(10 ** (1 + 2 * 0.8))


def test_d90_averages_seeds_leaves_out_what_diverged_and_takes_the_first_crossing():
  assert intrinsic.d90([10, 1000, 1000, 10], [0.4, 0.8, 1.0, 0.6], 0.9) == pytest.approx(10 ** (1 + 2 * 0.31 / 0.4))
  assert intrinsic.d90([10, 100, 1000], [0.5, np.nan, 0.9], 0.9, share=0.7777777777777778) == pytest.approx(
    10 ** (1 + 2 * 0.5)
  )
  assert intrinsic.d90([1, 10, 100], [0.95, 0.5, 1.0], 1.0) == 1
  assert intrinsic.d90([1, 10, 100, 1000], [0.5, 0.9, 0.7, 1.0], 1.0) == pytest.approx(10)


@pytest.mark.parametrize(
  "given, message",
  [
    (([1, 2], [0.5], 1.0), "as many"),
    (([0, 2], [0.5, 0.6], 1.0), "positive"),
    (([1], [0.5], 0.5, 0.5), "other than that of the base"),
    (([1], [0.5], float("nan")), "other than that of the base"),
  ],
)
def test_d90_refuses_what_makes_no_sense(given, message):
  with pytest.raises(errors.UserError, match=message):
    intrinsic.d90(*given)
