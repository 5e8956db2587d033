"""What runs on a GPU alone: cuDNN's attention is XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.model import layers

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
B, N, K, H = 3, 9, 3, 64


def attended(implementation, members, mask, length):
  """The output and gradients of attention, of bfloat16 arrays."""

  def loss(q, k, v, g):
    out = layers.attention(q, k, v, mask=mask, implementation=implementation, members=members > 0)
    return (out * g).astype(jnp.float32).sum(), out

  keys = jax.random.split(jax.random.key(0), 4)
  shape = lambda n: (*((members,) if members else ()), B, length, n, H)
  arrays = [jax.random.normal(k, shape(n), jnp.bfloat16) for k, n in zip(keys, (N, K, K, N), strict=True)]
  run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  (_, out), grads = jax.jit(jax.vmap(run) if members else run)(*arrays)
  return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize("length", [64, 96, 128, 192])
@pytest.mark.parametrize("members", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_attention(length, members, masked):
  """With rows that examples share, one of them all padding, too; alone and of members."""
  mask = None
  if masked:
    at = np.arange(length)
    segments = np.array([1 + at // 20, np.where(at < 50, 1 + at // 30, 0), 0 * at])
    mask = jnp.asarray((segments[:, :, None] == segments[:, None]) & np.tri(length, dtype=bool))
  fused, plain = (attended(i, members, mask, length) for i in ("cudnn", "xla"))
  for got, want in zip(fused, plain, strict=True):
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
