"""Bottleneck adapters against torch modules on transformers models, and where they are put."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, tree, weights
from lora_jax.methods import bottleneck, houlsby, parallel, pfeiffer
from lora_jax.model import layers, transformer
from tests import noise, test_families

KEY = jax.random.key(3)
PARITY = [
  *[("houlsby", "bert-classifier"), ("pfeiffer", "neox"), ("parallel", "gpt2")],
  *[pytest.param("houlsby", case, marks=pytest.mark.slow) for case in ("gpt2", "llama", "t5")],
  *[pytest.param("pfeiffer", case, marks=pytest.mark.slow) for case in ("bert-mlm", "gemma2")],
  *[pytest.param("parallel", case, marks=pytest.mark.slow) for case in ("bert-classifier", "phi3-window", "t5")],
]
ACTIVATION = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}


def config(**kw):
  fields = dict(vocab_size=31, d_model=12, n_layers=3, n_heads=3, n_kv_heads=3, head_dim=4, d_ff=20)
  return transformer.Config(**fields, dtype="float32", **kw)


@functools.cache
def random(**kw):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), transformer.shapes(config(**kw))
  )


def hooked(torch, ref, model, params, name):
  """Puts torch reimplementations of the adapters in `params` on a transformers model.

  Returns:
    ({name of an adapter: its torch parameters, one dict a layer}, hooks to remove).
  """
  keys = {k.path: k for k in model.keys}
  adapters = dict(_adapters(params))
  out, hooks = {}, []
  for place, node in adapters.items():
    into = f"{place}/down" if name == "parallel" else place
    up = next((p for p in (f"{place}/up/kernel", f"{place}/gate_up/kernel") if p in keys), None)
    out[place] = []
    for i in range(node.scale.shape[0]):
      one = jax.tree.map(lambda x: np.asarray(x[i]), node)
      down = torch.nn.Linear(*one.down.shape)
      up_ = torch.nn.Linear(*one.up.shape)
      with torch.no_grad():
        for module, w, b in ((down, one.down, one.down_bias), (up_, one.up, one.up_bias)):
          module.weight.copy_(torch.tensor(w.T))
          module.bias.copy_(torch.tensor(b))
      act = getattr(torch.nn.functional, ACTIVATION[name])
      bottleneck = lambda x, down=down, up_=up_, act=act: up_(act(down(x)))
      after = ref.get_submodule(keys[f"{into}/kernel"].module.format(i))
      if name == "parallel":
        seen = {}
        before = ref.get_submodule(keys[up].module.format(i))
        hooks.append(before.register_forward_hook(lambda m, x, y, seen=seen: seen.update(x=x[0])))
        fn = lambda m, x, y, seen=seen, bottleneck=bottleneck: y + 4.0 * bottleneck(seen["x"])
      else:
        fn = lambda m, x, y, bottleneck=bottleneck: y + bottleneck(y)
      hooks.append(after.register_forward_hook(fn))
      out[place].append(
        {"down": down.weight, "down_bias": down.bias, "up": up_.weight, "up_bias": up_.bias, "scale": None}
      )
  return out, hooks


def _adapters(params, path=()):
  for k, v in params.items():
    if isinstance(v, bottleneck.Bottleneck):
      yield "/".join(path), v
    elif isinstance(v, dict):
      yield from _adapters(v, (*path, k))


@pytest.mark.parametrize("name, case", PARITY)
def test_outputs_and_gradients_equal_torch(name, case):
  torch = pytest.importorskip("torch")
  ref, model = test_families.pair(case)
  params, mask = methods.init(KEY, model.params, {"name": name, "size": 5})
  moved = tree.map_named(
    lambda k, x, m: noise.add(k, x, 0.2) if m and "/adapter/" in k else x,
    params,
    mask,
  )
  trainable, frozen = tree.split(moved, mask)
  theirs, hooks = hooked(torch, ref, model, moved, name)
  try:
    ref.zero_grad()
    y = test_families.run_reference(ref)
    weight = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32) / y[..., 0].numel()
    (y * torch.tensor(weight)).sum().backward()
  finally:
    for hook in hooks:
      hook.remove()

  def loss(t):
    out = test_families.outputs(model.config, tree.join(t, frozen), test_families.TOKENS)
    return (out * weight).sum(), out

  grads, ours = test_families.fast(jax.grad(loss, has_aux=True))(trainable)
  np.testing.assert_allclose(ours, y.detach().numpy(), atol=1e-4, rtol=1e-4)
  base = test_families.jitted(model.config, model.params, test_families.TOKENS)
  assert np.abs(np.asarray(ours) - np.asarray(base)).max() > 1e-2
  grads = tree.flatten(grads)
  for place, each in theirs.items():
    for field in ("down", "down_bias", "up", "up_bias"):
      expected = np.stack([p[field].grad.numpy().T for p in each])
      np.testing.assert_allclose(grads.pop(f"{place}/adapter/{field}"), expected, atol=1e-4, rtol=1e-4)
  assert bool(grads) == (name == "houlsby")
  named, keys = dict(ref.named_parameters()), {k.path: k for k in model.keys}
  for k, g in grads.items():  # norms
    names = [keys[k].hf.format(i) for i in range(g.shape[0])] if transformer.stacked(k) else [keys[k].hf]
    expected = np.stack([named[n].grad.numpy() for n in names]).reshape(g.shape)
    np.testing.assert_allclose(g, expected, atol=1e-4, rtol=1e-4)


def places(params):
  return {k for k, _ in _adapters(params)}


@pytest.mark.parametrize(
  "module, expected",
  [
    (houlsby, {"layers/attn/o", "layers/mlp/down", "encoder/layers/attn/o", "encoder/layers/mlp/down"}),
    (pfeiffer, {"layers/mlp/down", "encoder/layers/mlp/down"}),
    (parallel, {"layers/mlp", "encoder/layers/mlp"}),
  ],
)
def test_places_of_an_encoder_decoder(module, expected):
  assert places(module.init(KEY, random(encoder_layers=2), size=4)[0]) == expected


def test_cross_attention_is_there_for_the_asking():
  params, _ = houlsby.init(KEY, random(encoder_layers=2), size=4, targets="o")
  assert places(params) == {"layers/attn/o", "layers/cross/o", "encoder/layers/attn/o"}


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_sizes(norm):
  """2 m D + D + m a module; norms besides."""
  D, L, m = 12, 3, 5
  params = random(norm=norm)
  module = 2 * m * D + D + m
  norms = (2 * L + 1) * D * (2 if norm == "layer" else 1)
  expected = {"houlsby": 2 * L * module + norms, "pfeiffer": L * module, "parallel": L * module}
  for name, size in expected.items():
    assert methods.size(*methods.init(KEY, params, {"name": name, "size": m})) == size
  assert methods.size(*houlsby.init(KEY, params, size=m, train_norms=False)) == 2 * L * module


def test_size_of_bert_base():
  """64 wide in BERT-base: 2.4M in adapters, by shapes alone."""
  c = config(norm="layer", gated=False, mlp_bias=True)
  c = transformer.dataclasses.replace(c, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, d_ff=3072)
  params = jax.eval_shape(lambda p: houlsby.init(KEY, p, train_norms=False)[0], transformer.shapes(c))
  n = sum(x.size for _, a in _adapters(params) for x in (a.down, a.down_bias, a.up, a.up_bias))
  assert n == 24 * (2 * 64 * 768 + 768 + 64) == 2379264


def test_masks():
  _, mask = houlsby.init(KEY, random(qk_norm=True), size=4)
  trained = {k for k, m in tree.flatten(mask).items() if m}
  fields = {f"{p}/adapter/{f}" for p in ("layers/attn/o", "layers/mlp/down") for f in FIELDS}
  norms = {"layers/attn_norm", "layers/mlp_norm", "layers/attn/q_norm", "layers/attn/k_norm", "norm"}
  assert trained == fields | {f"{k}/scale" for k in norms}
  _, mask = parallel.init(KEY, random(), size=4)
  assert {k for k, m in tree.flatten(mask).items() if m} == {f"layers/mlp/adapter/{f}" for f in FIELDS}


FIELDS = ("down", "down_bias", "up", "up_bias")


@pytest.mark.parametrize("module", [houlsby, pfeiffer, parallel])
def test_single_layers(module):
  """Layers that are not chosen compute exactly the base, and do not count."""
  params = random()
  kind = "mlp/down"
  adapted, mask = module.init(KEY, params, size=4, targets=f"layers/1/{kind}/kernel")
  adapted = noise.moved(adapted, mask, 0.2)
  (_, node), *rest = _adapters(adapted)
  assert not rest
  np.testing.assert_array_equal(np.asarray(node.scale) != 0, [False, True, False])
  x = jax.random.normal(KEY, (2, 5, 12))
  layer = lambda p, i: layers.mlp(x, jax.tree.map(lambda w: w[i], p["layers"]["mlp"]), "silu")
  for i in (0, 2):
    np.testing.assert_array_equal(layer(adapted, i), layer(params, i))
  assert np.abs(layer(adapted, 1) - layer(params, 1)).max() > 1e-2
  assert node.n_padding(mask["layers"]["mlp"].get("adapter") or mask["layers"]["mlp"]["down"]["adapter"]) == 2 * (
    2 * 4 * 12 + 12 + 4
  )


@pytest.mark.parametrize(
  "init, down, up", [("zero", 1e-2, 0), ("paper", 1e-2, 1e-2), ("repo", 1e-3, 1e-3), ("lora", 1 / np.sqrt(3 * 256), 0)]
)
def test_initial_values(init, down, up):
  params = {"layers": {"mlp": {"down": {"kernel": jnp.zeros((2, 8, 256))}}}}
  ((_, node),) = _adapters(pfeiffer.init(KEY, params, size=128, init=init)[0])
  narrow = 1.0 if init == "lora" else 0.88  # what cutting at two deviations leaves of the deviation
  for x, deviation in ((node.down, down), (node.up, up)):
    np.testing.assert_allclose(x.std((1, 2)), narrow * deviation, rtol=0.05)
    assert init == "lora" or np.abs(x).max() <= 2 * deviation * (1 + 1e-6)
    assert not deviation or not np.array_equal(x[0], x[1])
  assert not node.down_bias.any() and not node.up_bias.any() and node.down.dtype == jnp.float32


def test_layers_have_their_own_values_whatever_else_is_chosen():
  params = random()
  both, _ = houlsby.init(KEY, params, size=4)
  one, _ = houlsby.init(KEY, params, size=4, targets="down")
  jax.tree.map(np.testing.assert_array_equal, one["layers"]["mlp"], both["layers"]["mlp"])


def test_the_compute_dtype_is_that_of_the_input():
  ((_, node),) = _adapters(pfeiffer.init(KEY, random(), size=4, targets="layers/0/mlp/down/")[0])
  node = jax.tree.map(lambda x: x[0], node)
  x = jax.random.normal(KEY, (2, 5, 12), jnp.bfloat16)
  assert node(x).dtype == jnp.bfloat16
  grads = jax.grad(lambda n: n(x).astype(jnp.float32).sum())(node)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_strip_and_merge():
  params = random()
  adapted, _ = parallel.init(KEY, params, size=4)
  jax.tree.map(np.testing.assert_array_equal, weights.strip(adapted), params)
  with pytest.raises(errors.UserError, match="layers/mlp/adapter"):
    weights.merge(adapted)


@pytest.mark.slow
def test_an_adapter_on_a_lora():
  """Methods in a list: the bottleneck sees the output of the adapted matrix."""
  c, params = config(), random()
  tokens = jnp.arange(10)[None]
  both, mask = methods.init(KEY, params, [{"name": "lora", "targets": "down"}, {"name": "pfeiffer", "size": 4}])
  trained = {re.sub(".*/mlp/down/", "", k) for k, m in tree.flatten(mask).items() if m}
  assert trained == {"kernel/a", "kernel/b", *(f"adapter/{f}" for f in FIELDS)}
  np.testing.assert_array_equal(transformer.apply(c, both, tokens), transformer.apply(c, params, tokens))
  both = noise.moved(both, mask, 0.2)
  dense = jax.tree.map(weights.dense, both, is_leaf=weights.is_node)
  np.testing.assert_allclose(transformer.apply(c, dense, tokens), transformer.apply(c, both, tokens), atol=1e-4)


EXPERTS = dict(n_experts=3)


@pytest.mark.parametrize(
  "init, kw, message",
  [
    (houlsby.init, dict(size=0), "size >= 1"),
    (houlsby.init, dict(activation="gelo"), "did you mean 'gelu'"),
    (houlsby.init, dict(init="papre"), "did you mean 'paper'"),
    (houlsby.init, dict(targets="q"), "layers/attn/q/kernel has axes .3, 4."),
    (houlsby.init, dict(targets="donw"), "did you mean 'down'"),
    (parallel.init, dict(targets="attn/o/kernel$"), "matches nothing"),
    (houlsby.init, EXPERTS, "mixtures of experts.*attn/o"),
    (pfeiffer.init, EXPERTS, "mixtures of experts.*attn/o"),
    (parallel.init, EXPERTS, "mixtures of experts.*houlsby"),
  ],
)
def test_what_is_refused(init, kw, message):
  params = random(**EXPERTS) if kw is EXPERTS else random()
  with pytest.raises(errors.UserError, match=message):
    init(KEY, params, **({} if kw is EXPERTS else kw))


def test_attention_adapters_of_experts():
  assert places(houlsby.init(KEY, random(**EXPERTS), size=4, targets="attn/o/kernel$")[0]) == {"layers/attn/o"}


def test_two_in_one_place_are_refused():
  init = functools.partial(methods.init, KEY, random())
  with pytest.raises(errors.UserError, match="two bottlenecks"):
    init([{"name": "houlsby"}, {"name": "pfeiffer"}])
  assert places(init([{"name": "pfeiffer"}, {"name": "parallel"}])[0]) == {"layers/mlp", "layers/mlp/down"}
