"""What runs on a GPU alone: cuDNN's attention is XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import layers

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
B, T, N, K, H = 3, 64, 6, 2, 32


def attended(implementation, members, mask):
  """The output and gradients of attention, of bfloat16 arrays."""

  def loss(q, k, v, g):
    how = dict(mask=mask, implementation=implementation, members=members > 0)
    out = layers.attention(q, k, v, **how)
    return (out * g).astype(jnp.float32).sum(), out

  shapes = [(B, T, n, H) for n in (N, K, K, N)]
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [jax.random.normal(k, (*(members or 1,), *s), jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
  run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  (_, out), grads = jax.jit(jax.vmap(run) if members else run)(*(arrays if members else [x[0] for x in arrays]))
  return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize("members", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_attention(members, masked):
  """With rows that examples share and padding ends, too; alone and of members."""
  mask = None
  if masked:
    segments = np.array([[1] * 20 + [2] * 44, [1] * 30 + [2] * 20 + [0] * 14, [1] * 64])
    mask = (segments[:, :, None] == segments[:, None]) & np.tri(T, dtype=bool) & (segments > 0)[:, None]
    mask = jnp.asarray(mask)
  for got, want in zip(attended("cudnn", members, mask), attended("xla", members, mask), strict=True):
    if masked:  # what padding sees does not matter
      got, want = (x[..., 0, :, :, :] if x.ndim == 4 else x[:, 0] for x in (got, want))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
