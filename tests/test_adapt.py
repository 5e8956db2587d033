"""`lora_jax.adapt` and the bridges to Flax: one adapter tree, one result, whatever the path."""

import doctest
import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import lora_jax
from lora_jax import bridges, errors, methods, tree, weights
from lora_jax.bridges import function
from tests import noise

KEY = jax.random.key(1)


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
    x = nn.Conv(4, (2, 3), padding="VALID", kernel_dilation=(2, 1))(x)
    return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(11, 8, name="embed")
    x = embed(ids)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
    x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
    return embed.attend(x)


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 8, rngs=rngs)
    self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
    self.attn = nnx.MultiHeadAttention(2, 8, 8, rngs=rngs, decode=False)
    self.layers = nnx.List([nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)])

  def __call__(self, ids):
    x = self.embed(ids)
    x = self.attn(x + self.conv(x))
    return self.embed.attend(x + self.layers[1](nnx.relu(self.layers[0](x))))


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 5)))
IMAGES = jax.random.normal(jax.random.key(9), (2, 9, 9, 3))


@functools.cache
def case(kind):
  """(function of parameters and input, parameters, input, bridge as a function of rules)."""
  if kind == "nnx":
    model = MLP(nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, x):
      new = jax.tree.map(lambda x: x, state)
      nnx.replace_by_pure_dict(new, params)
      return nnx.merge(graph, new, rest)(x)

    return forward, nnx.to_pure_dict(state), IDS, functools.partial(bridges.nnx, model)
  model, x = {"cnn": (CNN(), IMAGES), "transformer": (Transformer(), IDS)}[kind]
  params = fast(lambda: model.init(jax.random.key(0), x))()["params"]
  return lambda p, x: model.apply({"params": p}, x), params, x, functools.partial(bridges.linen, model, params)


KINDS = ("cnn", "transformer", "nnx")
KERNELS = r"kernel|embedding"
RULES = {
  "lora": [(KERNELS, {"name": "lora", "rank": 2})],
  "dora": [(KERNELS, {"name": "dora", "rank": 2})],
  "ia3": [(KERNELS, "ia3")],
  "full": [(r"bias$", "full")],
  "mixed": [
    (r"(Dense_0|layers/0)/kernel", {"name": "lora", "rank": 3, "rslora": True}),
    (r"kernel", {"name": "pissa", "rank": 2}),
    (r"bias|LayerNorm", "full"),
  ],
}
for optional in ("loha", "lokr"):
  if optional in methods.names():
    RULES[optional] = [(KERNELS, {"name": optional, "rank": 2})]


def noisy(adapter, seed=5, size=0.1):
  return tree.map_named(lambda k, x: noise.add(k, x, size, seed), adapter)


@pytest.mark.slow
def test_the_example_of_the_docstring():
  result = doctest.testmod(function)
  assert result.attempted > 10 and not result.failed


# Without LLVM's optimisations: these tests compile more than they compute.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Each rule on one kind of model, and those that differ most on all kinds.
ONCE = {(KINDS[i % len(KINDS)], rules) for i, rules in enumerate(RULES)}
PAIRS = sorted(ONCE | set(itertools.product(KINDS, ("lora", "mixed"))))


@pytest.mark.slow
@pytest.mark.parametrize("kind, rules", PAIRS)
def test_generic_bridged_and_merged_are_one(kind, rules):
  forward, params, x, bridge = case(kind)
  adapted, bridged = lora_jax.adapt(forward, params, RULES[rules]), bridge(RULES[rules])

  @fast
  def run(adapter):
    merged = adapted.merge(adapter)
    again = bridged.merge(adapter)(x) if kind == "nnx" else forward(bridged.merge(adapter), x)
    return forward(params, x), adapted.apply(adapter, x), bridged.apply(adapter, x), forward(merged, x), again

  adapter = adapted.init(KEY)
  jax.tree.map(np.testing.assert_array_equal, adapter, bridged.init(KEY))
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(adapter))
  base, *same = run(adapter)
  for y in same:
    np.testing.assert_allclose(y, base, atol=3e-6)
  _, generic, *same = run(noisy(adapter))
  assert np.abs(generic - base).max() > 1e-2
  for y in same:
    np.testing.assert_allclose(y, generic, atol=1e-5 * np.abs(generic).max())
  assert jax.tree.map(jnp.shape, adapted.merge(adapter)) == jax.tree.map(jnp.shape, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_training_changes_the_adapter_alone(kind):
  forward, params, x, bridge = case(kind)
  before = jax.tree.map(np.array, params)
  rules = [(KERNELS, {"name": "lora", "rank": 2}), (r"bias$", "full")]
  target = jax.random.normal(jax.random.key(3), forward(params, x).shape)
  optimiser, losses = optax.adam(1e-2), {}
  for name, adapted in (("generic", lora_jax.adapt(forward, params, rules)), ("bridge", bridge(rules))):

    @fast
    def step(adapter, state, adapted=adapted):
      loss = lambda a: jnp.mean((adapted.apply(a, x) - target) ** 2)
      value, grads = jax.value_and_grad(loss)(adapter)
      updates, state = optimiser.update(grads, state, adapter)
      return optax.apply_updates(adapter, updates), state, value

    adapter = adapted.init(KEY)
    state = optimiser.init(adapter)
    losses[name] = []
    for _ in range(8):
      adapter, state, value = step(adapter, state)
      losses[name].append(float(value))
    assert losses[name][-1] < 0.9 * losses[name][0]
    assert set(tree.names(adapter)) == {
      *(k for k in tree.names(params) if k.endswith("bias")),
      *(f"{k}/{f}" for k in tree.names(params) if k.endswith(("kernel", "embedding")) for f in "ab"),
    }
    merged = tree.flatten(adapted.merge(adapter) if kind != "nnx" or name == "generic" else params)
    frozen = [k for k in tree.names(params) if "LayerNorm" in k and k.endswith("scale")]
    assert all(np.array_equal(merged[k], tree.flatten(params)[k]) for k in frozen)
  np.testing.assert_allclose(losses["generic"], losses["bridge"], rtol=2e-3)
  jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize(
  "shape, extra, a, b",
  [
    ((6, 5), {}, (6, 2), (2, 5)),
    ((6, 2, 5), {}, (6, 2), (2, 2, 5)),
    ((2, 3, 6), {"in_axes": 2}, (2, 3, 2), (2, 6)),
    ((3, 3, 4, 5), {}, (3, 3, 4, 2), (2, 5)),
    ((3, 3, 4, 5), {"in_axes": 1}, (3, 2), (2, 3, 4, 5)),
    ((4, 6, 5), {"stacked": True}, (4, 6, 2), (4, 2, 5)),
    ((4, 2, 3, 6), {"stacked": True, "in_axes": 2}, (4, 2, 3, 2), (4, 2, 6)),
  ],
)
def test_axes(shape, extra, a, b):
  params = {"w": {"kernel": jax.random.normal(KEY, shape)}}
  adapted = lora_jax.adapt(lambda p: p, params, [("kernel", {"name": "lora", "rank": 2, **extra})])
  node = adapted.init(KEY)["w"]["kernel"]
  assert (node.a.shape, node.b.shape) == (a, b)
  adapter = noisy({"w": {"kernel": node}})
  node = adapter["w"]["kernel"]
  n = len(a) - 1 - ("stacked" in extra)
  product = lambda a, b: jnp.tensordot(a, b, 1)
  delta = 8 * (jax.vmap(product) if "stacked" in extra else product)(node.a, node.b)  # alpha / rank
  assert n == len(a) - 1 - ("stacked" in extra)
  np.testing.assert_allclose(adapted.apply(adapter)["w"]["kernel"], params["w"]["kernel"] + delta, atol=1e-5)


@pytest.mark.parametrize("name, a", [("conv1/kernel", (3, 4, 2)), ("out/kernel", (3, 4, 2)), ("query/kernel", (3, 2))])
def test_axes_by_name(name, a):
  first, last = name.split("/")
  adapted = lora_jax.adapt(lambda p: p, {first: {last: jnp.ones((3, 4, 5))}}, [("", {"name": "lora", "rank": 2})])
  assert adapted.init(KEY)[first][last].a.shape == a


@pytest.mark.slow
def test_convolutions_equal_those_of_peft():
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  ours = nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", name="conv")
  x = np.random.default_rng(0).standard_normal((2, 9, 8, 4)).astype(np.float32)
  params = ours.init(KEY, x)["params"]
  theirs = torch.nn.Sequential(torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1)))
  with torch.no_grad():
    theirs[0].weight.copy_(torch.tensor(np.transpose(params["kernel"], (3, 2, 0, 1))))
    theirs[0].bias.copy_(torch.tensor(np.asarray(params["bias"])))
  theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6)).eval()
  bridged = bridges.linen(ours, params, [("kernel", {"name": "lora", "rank": 2, "alpha": 6})])
  adapter = noisy(bridged.init(KEY))
  layer = theirs.base_model.model[0]
  a, b = np.asarray(adapter["kernel"].a), np.asarray(adapter["kernel"].b)
  with torch.no_grad():
    layer.lora_A["default"].weight.copy_(torch.tensor(np.transpose(a, (3, 2, 0, 1))))
    layer.lora_B["default"].weight.copy_(torch.tensor(b.T[:, :, None, None].copy()))
    expected = theirs(torch.tensor(np.transpose(x, (0, 3, 1, 2)))).permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(bridged.apply(adapter, x), expected, atol=1e-5)


def test_other_collections_and_keywords():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

  model, x = Normed(), jax.random.normal(KEY, (8, 4))
  variables = model.init(KEY, x, train=False)
  bridged = bridges.linen(model, variables["params"], [("kernel", {"name": "lora", "rank": 2})])
  adapter, stats = noisy(bridged.init(KEY)), {"batch_stats": variables["batch_stats"]}
  y, updated = bridged.apply(adapter, x, train=True, variables=stats, mutable=["batch_stats"])
  expected = model.apply({"params": bridged.merge(adapter), **stats}, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(y, expected[0], atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, updated, expected[1])


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_dropout_needs_the_inputs_of_layers(kind):
  model = nn.Dense(5) if kind == "dense" else nn.Conv(5, (1,))
  axes = {} if kind == "dense" else {"in_axes": 2}
  x = jnp.ones((2000, 4) if kind == "dense" else (2000, 1, 4))
  params = model.init(KEY, x)["params"]
  rules = [("kernel", {"name": "lora", "rank": 2, "dropout": 0.5, **axes})]
  bridged = bridges.linen(model, params, rules)
  adapter = noisy(bridged.init(KEY))
  still = bridged.apply(adapter, x)
  np.testing.assert_allclose(still, model.apply({"params": bridged.merge(adapter)}, x), atol=1e-5)
  dropped = bridged.apply(adapter, x, rngs={"dropout": jax.random.key(2)})
  assert np.abs(dropped - still).max() > 1e-2
  np.testing.assert_allclose(dropped.mean(0), still.mean(0), atol=0.05 * np.abs(still).max())
  with pytest.raises(errors.UserError, match="dropout.*bridges.linen"):
    lora_jax.adapt(lambda p, x: model.apply({"params": p}, x), params, rules)
  with pytest.raises(errors.UserError, match="dropout.*bridges.linen"):
    bridges.nnx(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), [("kernel", {"name": "lora", "dropout": 0.5})])
  if axes:
    bridged = bridges.linen(model, params, [(rules[0][0], rules[0][1] | {"in_axes": 1})])
    with pytest.raises(errors.UserError, match="in_axes"):
      bridged.apply(bridged.init(KEY), x)


@pytest.mark.parametrize("kind", ["generic", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)])
def test_pretrained_parameters_as_an_argument(kind):
  """With `base` a compiled program has no constants of the size of a weight."""
  if kind == "generic":
    params, x = {"w": jnp.ones((100, 90))}, jnp.ones((2, 100))
    adapted = lora_jax.adapt(lambda p, x: x @ p["w"], params, [("w", {"name": "lora", "rank": 2})])
  else:
    forward, params, x, bridge = case(kind)
    adapted = bridge(RULES["lora"])
  adapter = noisy(adapted.init(KEY))
  twice = jax.tree.map(lambda w: 2 * w, params)
  run = lambda a, base, x: adapted.apply(a, x, base=base)
  closed = jax.make_jaxpr(run)(adapter, twice, x)
  assert all(np.size(c) < 50 for c in closed.consts)
  assert any(np.size(c) > 50 for c in jax.make_jaxpr(lambda a, x: adapted.apply(a, x))(adapter, x).consts)
  if kind != "nnx":
    model = (lambda p, x: x @ p["w"]) if kind == "generic" else forward
    expected = fast(lambda: model(adapted.merge(adapter, twice), x))()
    np.testing.assert_allclose(fast(run)(adapter, twice, x), expected, rtol=1e-4, atol=1e-4)


def test_dtypes():
  """Adapters are float32, the model sees its own dtype, gradients come back in float32."""
  params = {"kernel": jnp.ones((6, 4), jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)}
  seen = []

  def forward(p, x):
    seen.append({k: w.dtype for k, w in p.items()})
    return x @ p["kernel"] + p["bias"]

  adapted = lora_jax.adapt(forward, params, [("kernel", "lora"), ("bias", "full")])
  adapter = adapted.init(KEY)
  grads = jax.grad(lambda a: adapted.apply(a, jnp.ones((2, 6), jnp.bfloat16)).sum().astype(jnp.float32))(adapter)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  assert set(seen[-1].values()) == {jnp.dtype("bfloat16")}


def test_rules_are_ordered_and_the_first_that_is_found_decides():
  params = {"a": {"kernel": jnp.ones((3, 3))}, "b": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
  rules = [("^a/", None), ("kernel", {"name": "lora", "rank": 1}), ("", "full")]
  adapter = lora_jax.adapt(lambda p: p, params, rules).init(KEY)
  assert tree.names(adapter) == ["b/bias", "b/kernel/a", "b/kernel/b"]
  assert adapter["a"] == {"kernel": None}


def test_initial_values():
  params = {"a": {"kernel": jnp.ones((30, 20))}, "b": {"kernel": jnp.ones((30, 20)), "embedding": jnp.ones((50, 20))}}
  init = lora_jax.adapt(lambda p: p, params, [("", {"name": "lora", "rank": 4})]).init
  adapter, other = init(KEY), init(jax.random.key(2))
  a, b, table = adapter["a"]["kernel"], adapter["b"]["kernel"], adapter["b"]["embedding"]
  assert not np.array_equal(a.a, b.a) and not np.array_equal(a.a, other["a"]["kernel"].a)
  assert np.abs(a.a).max() <= 30**-0.5 and not a.b.any()
  assert not table.a.any() and 0.7 < table.b.std() < 1.3  # of an embedding the first factor is zero
  alone = lora_jax.adapt(lambda p: p, params, [("a/", {"name": "lora", "rank": 4})]).init(KEY)
  np.testing.assert_array_equal(alone["a"]["kernel"].a, a.a)


def test_a_start_that_is_subtracted_does_not_depend_on_the_key_of_the_adapter():
  """PiSSA by randomised SVD: the frozen start is what is trained from."""
  params = {"kernel": jax.random.normal(KEY, (12, 10))}
  adapted = lora_jax.adapt(lambda p: p["kernel"], params, [("", {"name": "pissa", "rank": 2, "iterations": 1})])
  np.testing.assert_allclose(adapted.apply(adapted.init(jax.random.key(7))), params["kernel"], atol=1e-6)


@pytest.mark.slow
def test_several_adapters_under_vmap():
  *_, x, bridge = case("nnx")
  bridged = bridge(RULES["lora"])
  each = [noisy(bridged.init(KEY), seed) for seed in range(2)]
  both = fast(jax.vmap(bridged.apply, (0, None)))(jax.tree.map(lambda *a: jnp.stack(a), *each), x)
  run = fast(bridged.apply)
  for y, adapter in zip(both, each, strict=True):
    np.testing.assert_allclose(y, run(adapter, x), atol=1e-4)


@pytest.mark.slow
def test_every_method_works_or_says_that_it_does_not():
  params = {"a": {"kernel": jax.random.normal(KEY, (8, 8))}}
  works = set()
  for name in methods.names():
    try:
      adapted = lora_jax.adapt(lambda p: p["a"]["kernel"], params, [("kernel", name)])
    except errors.UserError as e:
      assert "a/kernel" in str(e) or "config.method" in str(e), name
      continue
    works.add(name)
    adapter = adapted.init(KEY)
    if not hasattr(methods.get(name), "STARTS"):
      np.testing.assert_allclose(adapted.apply(adapter), params["a"]["kernel"], atol=1e-5, err_msg=name)
    assert np.abs(adapted.apply(noisy(adapter)) - params["a"]["kernel"]).max() > 1e-2, name
  assert {"full", "lora", "dora"} <= works and not {"houlsby", "parallel"} & works


PARAMS = {
  "Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
  "ids": jnp.arange(3),
  "cube": jnp.ones((2, 3, 4)),
}


@pytest.mark.parametrize(
  "rules, message",
  [
    ([("Dense_1", "lora")], "'Dense_1' matches nothing; did you mean 'Dense_0/bias'"),
    ([("Dense_0/kernel", "lora"), ("nope", "full")], "'nope' matches nothing; valid: Dense_0/bias, .*cube, ids"),
    ([("(", "lora")], "not a regular expression"),
    ([("kernel", "lroa")], "unknown method 'lroa'; did you mean 'lora'"),
    ([("kernel", {"name": "lora", "rnak": 2})], "unknown key .*Dense_0/kernel.*rnak; did you mean 'rank'"),
    ([("kernel", {"name": "lora", "targets": "q"})], "unknown key .*targets"),
    ([("kernel", {"name": "ia3", "rank": 2})], "unknown key .*rank"),
    ([("kernel", {"name": "full", "targets": "x"})], "'full' takes no keywords"),
    ([("kernel", {"rank": 2})], "has a name"),
    ([("kernel", 3)], "has a name"),
    (["kernel"], "a rule is .regex, method."),
    ([("kernel", None)], "adapt nothing"),
    ([("Dense_0", "lora")], "rule for Dense_0/bias: its shape .4,. is not a matrix"),
    ([("ids", "full")], "rule for ids: its dtype int32 cannot be trained"),
    ([("cube", {"name": "lora", "in_axes": 3})], "in_axes=3, expected 1 to 2"),
    ([("kernel", {"name": "lora", "stacked": True})], "is not a matrix"),
    ([("kernel", {"name": "houlsby"})], "does not adapt a single weight"),
    ([("kernel", {"name": "lora", "lora_bias": True})], "rule for .*kernel: the adapter has a bias"),
  ],
)
def test_rules_that_are_refused(rules, message):
  with pytest.raises(errors.UserError, match=message):
    lora_jax.adapt(lambda p: p, PARAMS, rules)


def test_methods_that_need_more_than_a_node_are_refused():
  needy = [n for n in methods.names() if any(hasattr(methods.get(n), h) for h in ("penalty", "optimiser", "between"))]
  for name in needy:
    with pytest.raises(errors.UserError, match=f"{name!r} needs lora_jax's own training"):
      lora_jax.adapt(lambda p: p, PARAMS, [("kernel", name)])


def test_boxes_of_metadata_are_refused():
  model = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "tensor")))
  params = model.init(KEY, jnp.ones((1, 4)))["params"]
  with pytest.raises(errors.UserError, match="unbox"):
    bridges.linen(model, params, [("kernel", "lora")])
  bridged = bridges.linen(model, nn.meta.unbox(params), [("kernel", "lora")])
  adapter = noisy(bridged.init(KEY))
  np.testing.assert_allclose(
    bridged.apply(adapter, jnp.ones((1, 4))),
    model.apply({"params": bridged.merge(adapter)}, jnp.ones((1, 4))),
    rtol=1e-5,
  )


def test_merging_without_nodes_copies_nothing():
  params = {"a": jnp.ones((3, 3)), "b": jnp.ones(3)}
  adapted = lora_jax.adapt(lambda p: p, params, [("b", "full")])
  assert adapted.merge(adapted.init(KEY))["a"] is params["a"]
  assert not any(weights.is_node(w) for w in jax.tree.leaves(adapted.init(KEY), is_leaf=weights.is_node))


@pytest.mark.slow
def test_the_example_in_the_readme_runs():
  text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
  (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "bridges" in c)
  names = {}
  exec(code, names)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(names["grads"]["layers_0"]["bias"]))
  out = names["adapted"].apply(names["adapter"], names["x"])
  np.testing.assert_allclose(names["cnn"].apply({"params": names["merged"]}, names["x"]), out, atol=1e-6)
