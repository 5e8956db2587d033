"""Parameters that training has moved, by noise of NumPy: JAX would compile a program for every shape."""

import jax.numpy as jnp
import numpy as np

from lora_jax import tree, weights


def add(name, x, size=0.1, seed=1):
  """x [...] with normal noise of standard deviation `size` that follows from `name` and `seed`."""
  noise = np.random.default_rng([seed, *name.encode()]).standard_normal(x.shape, np.float32)
  return jnp.asarray(np.asarray(x) + size * noise.astype(x.dtype), x.dtype)


def moved(params, mask, size=0.1, seed=1):
  """Parameters with noise on the trained leaves; what pads smaller ranks stays zero."""

  def node(k, w, m):
    w = tree.map_named(lambda n, x, t: add(f"{k}/{n}", x, size, seed) if t else x, w, m)
    return w.clean() if isinstance(w, weights.Weight) else w

  return tree.map_named(node, params, mask, is_leaf=weights.is_node)
