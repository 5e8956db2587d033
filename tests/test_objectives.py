"""The chunked cross-entropy against the plain one: values, gradients, what is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, weights
from lora_jax.model import transformer
from lora_jax.training import head, train
from lora_jax.training.objectives import likelihood
from tests import terms

B, T, D, V, R = 3, 21, 8, 40, 2


def project(spec):
  return lambda w, x, dtype: weights.dot(spec, x, w, dtype)


def cross_entropy(fn, chunk, x, w, targets, loss_weights, smoothing=0.0):
  how = dict(chunk=chunk, label_smoothing=smoothing)
  return likelihood.cross_entropy(head.Projection(x, w, fn), targets, loss_weights, **how)


def plain(spec, x, w, targets, loss_weights, smoothing=0.0):
  logp = jax.nn.log_softmax(weights.dot(spec, x, w, jnp.float32))
  ll = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
  return -(loss_weights * ((1 - smoothing) * ll + smoothing * logp.mean(-1))).sum()


def inputs(fill=0.6, seed=0):
  k = jax.random.split(jax.random.key(seed), 6)
  x = jax.random.normal(k[0], (B, T, D))
  head = jax.random.normal(k[1], (D, V))
  targets = jax.random.randint(k[2], (B, T), 0, V)
  w = jax.random.uniform(k[3], (B, T)) * jax.random.bernoulli(k[4], fill, (B, T))
  return x, head, targets, w


@pytest.mark.parametrize("chunk", [1, 27, 1000])
@pytest.mark.parametrize("fill", [0.0, 0.2, 1.0])
def test_equals_plain_cross_entropy(chunk, fill):
  x, head, targets, w = inputs(fill)
  spec = "BTD,DV->BTV"
  ours = lambda x, head: cross_entropy(project(spec), chunk, x, head, targets, w)[0]
  want, grads = jax.value_and_grad(lambda *a: plain(spec, *a, targets, w), (0, 1))(x, head)
  got, ours_grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, head)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(ours(x, head), want, rtol=1e-6, atol=1e-6)
  for a, b in zip(ours_grads, grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("trained", ["frozen", "head", "lora"])
def test_label_smoothing_equals_the_plain_one(trained, smoothing=0.3):
  x, head, targets, w = inputs()
  k = jax.random.split(jax.random.key(7), 2)
  a, b = jax.random.normal(k[0], (D, R)), jax.random.normal(k[1], (R, V))
  node = lambda *ab: weights.LoRA(head, *ab, jnp.float32(0.5), jnp.int32(R))
  learned, build = {"frozen": ((), lambda: head), "head": ((head,), lambda h: h), "lora": ((a, b), node)}[trained]
  spec, numbers = "BTD,DV->BTV", tuple(range(1 + len(learned)))

  def ours(x, *learned):
    return cross_entropy(project(spec), 8, x, build(*learned), targets, w, smoothing)[0]

  def theirs(x, *learned):
    return plain(spec, x, build(*learned), targets, w, smoothing)

  want, grads = jax.value_and_grad(theirs, numbers)(x, *learned)
  got, ours_grads = jax.jit(jax.value_and_grad(ours, numbers))(x, *learned)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(ours(x, *learned), want, rtol=1e-6)
  for g, h in zip(ours_grads, grads, strict=True):
    np.testing.assert_allclose(g, h, atol=1e-5)
  assert abs(want - plain(spec, x, build(*learned), targets, w)) > 0.1


def test_label_smoothing_equals_torch():
  torch = pytest.importorskip("torch")
  x, head, targets, w = inputs()
  logits = torch.tensor(np.asarray(jnp.einsum("BTD,DV->BTV", x, head))).flatten(0, 1)
  each = torch.nn.functional.cross_entropy(
    logits, torch.tensor(np.asarray(targets)).flatten().long(), reduction="none", label_smoothing=0.1
  )
  want = (each.numpy() * np.asarray(w).flatten()).sum()
  got, _ = cross_entropy(project("BTD,DV->BTV"), 8, x, head, targets, w, 0.1)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_no_label_smoothing_is_the_same_program():
  x, head, targets, w = inputs()

  def program(*smoothing):
    fn = jax.grad(lambda x, h: cross_entropy(project("BTD,DV->BTV"), 8, x, h, targets, w, *smoothing)[0])
    return jax.jit(fn).lower(x, head).as_text()

  assert program() == program(0.0)
  assert program().count("\n") < program(0.1).count("\n")


@pytest.mark.slow
def test_label_smoothing_of_an_objective():
  config = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32")
  forward, params = train.Forward(config), transformer.init(config, jax.random.key(0))
  tokens = np.arange(12)[None]
  batch = {"tokens": tokens, "targets": tokens + 1, "positions": tokens, "weights": np.ones((1, 12), np.float32)}
  loss = lambda s: terms.sums(forward, params, batch, label_smoothing=s)[0]
  uniform = -jax.nn.log_softmax(forward.logits(transformer.head(params), forward(params, batch), jnp.float32)).mean(-1)
  np.testing.assert_allclose(loss(0.25), 0.75 * loss(0.0) + 0.25 * uniform.sum(), rtol=1e-6)
  for wrong in (-0.1, 1.0):
    with pytest.raises(errors.UserError, match="config.objective.label_smoothing=.* at least 0 and below 1"):
      loss(wrong)


def test_counts_correct_targets():
  x, head, targets, w = inputs()
  logits = jnp.einsum("BTD,DV->BTV", x, head)
  best = logits.argmax(-1)
  targets = jnp.where(jax.random.bernoulli(jax.random.key(9), 0.5, (B, T)), best, targets)
  _, correct = cross_entropy(project("BTD,DV->BTV"), 8, x, head, targets, w)
  np.testing.assert_allclose(correct, (w * (targets == best)).sum(), rtol=1e-6)


def test_gradient_through_a_lora_head_and_a_tied_head():
  x, head, targets, w = inputs()
  k = jax.random.split(jax.random.key(7), 2)
  a, b = jax.random.normal(k[0], (D, R)), jax.random.normal(k[1], (R, V))

  def loss(fn, a, b, x):
    node = weights.LoRA(head, a, b, jnp.float32(0.5), jnp.int32(R))
    return fn("BTD,DV->BTV", x, node)

  ours = jax.grad(lambda *p: loss(lambda s, x, n: cross_entropy(project(s), 8, x, n, targets, w)[0], *p), (0, 1, 2))
  want = jax.grad(lambda *p: loss(lambda s, x, n: plain(s, x, n, targets, w), *p), (0, 1, 2))
  for g, h in zip(ours(a, b, x), want(a, b, x), strict=True):
    np.testing.assert_allclose(g, h, atol=5e-6)
  tied = jax.grad(lambda h: cross_entropy(project("BTD,VD->BTV"), 8, x, h, targets, w)[0])(head.T)
  np.testing.assert_allclose(tied, jax.grad(lambda h: plain("BTD,VD->BTV", x, h, targets, w))(head.T), atol=5e-6)


def test_frozen_head_gets_no_gradient_buffer():
  """Neither an accumulator of the head's shape nor the logits of the whole batch exist in the compiled program."""
  x, head, targets, w = inputs()
  x, targets, w = (jnp.concatenate([a] * 8, axis=1) for a in (x, targets, w))
  fn = jax.grad(lambda x, head: cross_entropy(project("BTD,DV->BTV"), 8, x, head, targets, w)[0])
  text = jax.jit(fn).lower(x, head).as_text()
  assert f"tensor<{B}x{8}x{V}xf32>" in text
  assert f"tensor<{B}x{8 * T}x{V}xf32>" not in text
  assert text.count(f"tensor<{D}x{V}xf32>") and "dot_general" in text
  trained = jax.jit(jax.grad(lambda h: cross_entropy(project("BTD,DV->BTV"), 8, x, h, targets, w)[0]))
  zeros = f"stablehlo.broadcast_in_dim %cst, dims = [] : (tensor<f32>) -> tensor<{D}x{V}xf32>"
  assert zeros not in text
  assert f"-> tensor<{D}x{V}xf32>" in trained.lower(head).as_text()


@pytest.mark.slow
def test_padding_and_row_order_do_not_matter():
  """Sums over micro-batches equal the sum over the batch, and padded columns add nothing."""
  config = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32")
  params = transformer.init(config, jax.random.key(0))
  forward = train.Forward(config, packed=True)
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, 50, (4, 12)),
    "targets": rng.integers(0, 50, (4, 12)),
    "positions": np.broadcast_to(np.arange(12), (4, 12)),
    "weights": rng.random((4, 12)).astype(np.float32) * (np.arange(12) < 8),
  }
  loss = lambda p, b: terms.sums(forward, p, b, chunk=16)[0]
  whole, g = jax.value_and_grad(loss)(params, batch)
  parts = [{k: v[i : i + 1, :8] for k, v in batch.items()} for i in range(4)]
  sums = [jax.value_and_grad(loss)(params, p) for p in parts]
  np.testing.assert_allclose(sum(s for s, _ in sums), whole, rtol=1e-6)
  total = jax.tree.map(lambda *x: sum(x), *(h for _, h in sums))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), total, g)
