"""Section 7 of LoRA: laws of the similarity of subspaces and of the amplification factor."""

import json
import math

import jax
import numpy as np
import pytest

from lora_jax import errors, tree, weights
from lora_jax.methods import lora, pissa
from lora_jax.model import transformer
from lora_jax.results import subspace
from lora_jax.training import metrics

CONFIG = transformer.Config(50, 16, 4, 4, 2, 4, 24, dtype="float32")
FUSED = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32", fused=True)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def orthogonal(n, seed=0):
  return np.linalg.qr(draw(n, n, seed=seed))[0]


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, jax.random.key(0))


def trained(base, seed, method=lora, **kw):
  """Parameters with adapters whose trained leaves have moved."""
  params, mask = method.init(jax.random.key(seed), base, **kw)
  noise = lambda k, x: x + 0.3 * jax.random.normal(tree.fold(jax.random.key(seed), k), x.shape)
  moved = tree.map_named(lambda k, x, m: noise(k, x) if m else x, params, mask)
  return weights.map_nodes(lambda _, w: w.clean() if hasattr(w, "clean") else w, moved)


def dense_phi(a1, a2, i, j):
  """By the SVD of the paper's A, [r, d], in full."""
  v1, v2 = (np.linalg.svd(a.T, full_matrices=False)[2].T for a in (a1, a2))
  return np.linalg.norm(v1[:, :i].T @ v2[:, :j], "fro") ** 2 / min(i, j)


def test_similarity_is_that_of_the_paper():
  a1, a2 = draw(20, 3), draw(20, 5, seed=1) + 0.5
  phi = subspace.similarity(a1, a2)
  assert phi.shape == (3, 5)
  want = [[dense_phi(a1, a2, i, j) for j in range(1, 6)] for i in range(1, 4)]
  np.testing.assert_allclose(phi, want, rtol=1e-10)
  np.testing.assert_allclose(phi, subspace.similarity(a2, a1).T, rtol=1e-10)
  assert phi.min() >= 0 and phi.max() <= 1


def test_similarity_with_itself_is_one():
  a = draw(20, 6)
  np.testing.assert_allclose(subspace.similarity(a, a), np.ones((6, 6)), rtol=1e-12)


def test_whole_subspaces_do_not_depend_on_the_basis():
  a1, a2 = draw(20, 4), draw(20, 4, seed=1)
  phi, turned = subspace.similarity(a1, a2), subspace.similarity(a1 @ orthogonal(4), a2)
  np.testing.assert_allclose(turned, phi, rtol=1e-10)  # an orthogonal matrix leaves even the singular vectors
  mixed = subspace.similarity(a1 @ draw(4, 4, seed=2), a2)
  np.testing.assert_allclose(mixed[-1, -1], phi[-1, -1], rtol=1e-10)
  assert abs(mixed[0, 0] - phi[0, 0]) > 1e-3


def test_orthogonal_subspaces_share_nothing():
  q = orthogonal(12)
  np.testing.assert_allclose(subspace.similarity(q[:, :4] @ draw(4, 4), q[:, 4:9]), 0, atol=1e-12)


def test_random_subspaces_share_what_chance_gives():
  """The expectation of phi(i, j) is max(i, j) / d."""
  d, pairs = 64, [(draw(64, 4, seed=s), draw(64, 8, seed=1000 + s)) for s in range(400)]
  phi = np.mean([subspace.similarity(*p) for p in pairs], 0)
  want = np.maximum(np.arange(1, 5)[:, None], np.arange(1, 9)) / d
  np.testing.assert_allclose(phi, want, rtol=0.3)
  np.testing.assert_allclose(phi[-1, -1], 8 / d, rtol=0.05)


def test_stacked_layers_and_smaller_ranks():
  a1, a2 = draw(3, 20, 4), draw(3, 20, 5, seed=1)
  a1[1, :, 2:] = 0  # a layer of rank 2
  phi = subspace.similarity(a1, a2)
  assert phi.shape == (3, 4, 5)
  np.testing.assert_allclose(phi[0], subspace.similarity(a1[0], a2[0]), rtol=1e-10)
  np.testing.assert_allclose(phi[1, :2], subspace.similarity(a1[1, :, :2], a2[1]), rtol=1e-10)
  assert np.isnan(phi[1, 2:]).all() and not np.isnan(phi[[0, 2]]).any()


@pytest.mark.parametrize("r", [1, 4, 30])
def test_svd_of_a_product(r):
  a, b = draw(20, r), draw(r, 24, seed=1)
  u, s, v = subspace.product_svd(a, b)
  k = min(r, 20)
  np.testing.assert_allclose((u * s) @ v, a @ b, atol=1e-10)
  np.testing.assert_allclose(s[:k], np.linalg.svd(a @ b, compute_uv=False)[:k], rtol=1e-8)
  np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-10)


def test_amplification_by_dense_svd():
  w, a, b = draw(20, 24), draw(20, 4, seed=1), draw(4, 24, seed=2)
  for rank in (1, 3, 4, None, 9):
    got, r = subspace.amplification(w, a, b, rank), min(rank or 4, 4)
    u, s, v = np.linalg.svd(a @ b)
    assert got["rank"] == r
    np.testing.assert_allclose(got["change"], np.linalg.norm(a @ b))
    np.testing.assert_allclose(got["of_change"], np.linalg.norm(u[:, :r].T @ w @ v[:r].T))
    u, s, v = np.linalg.svd(w)
    np.testing.assert_allclose(got["of_weight"], np.linalg.norm(u[:, :r].T @ w @ v[:r].T))
    np.testing.assert_allclose(got["factor"], got["change"] / got["of_change"])


def test_a_change_along_the_weight_is_amplified_by_its_scale():
  """Of c W the directions are those of W, whatever c is, and the factor is c."""
  a, b = draw(20, 4), draw(4, 24, seed=1)
  for c in (0.1, -3.0):
    got = subspace.amplification(a @ b, c * a, b)
    np.testing.assert_allclose(got["of_change"], got["of_weight"])
    np.testing.assert_allclose(got["of_change"], got["weight"])
    np.testing.assert_allclose(got["factor"], abs(c))


def test_random_directions_hold_what_chance_gives():
  """r / d of the norm: with that of the paper's W_q, 61.95, table 7's 0.02 for r = 4 and 0.33 for r = 64."""
  w, a, b = draw(40, 40), draw(40, 4), draw(4, 40)
  drawn = [subspace.amplification(w, a, b, seed=s)["of_random"] ** 2 for s in range(300)]
  np.testing.assert_allclose(np.mean(drawn) ** 0.5, 4 / 40 * np.linalg.norm(w), rtol=0.05)
  for row in subspace.PUBLISHED:
    np.testing.assert_allclose(row["of_random"], row["rank"] / 12_288 * row["weight"], atol=0.011)


@pytest.mark.slow
def test_analysis_of_members(base):
  members = {f"r{r}": trained(base, seed, rank=r, targets="q,o") for seed, r in enumerate((2, 4))}
  result = subspace.analyse(members, base)
  assert json.loads(metrics.dumps(result)) == result
  assert [(e["members"], e["matrix"], e["layer"]) for e in result["similarity"]] == [
    (who, m, 2) for m in ("attn/o", "attn/q") for who in (["r2", "r4"], ["random", "random"])
  ]
  nodes = [tree.flatten(p, is_leaf=weights.is_node)["layers/attn/o/kernel"] for p in members.values()]
  a1, a2 = (np.asarray(n.a[2]).reshape(16, -1) for n in nodes)
  b1, b2 = (np.asarray(n.b[2]).reshape(-1, 16).T for n in nodes)
  np.testing.assert_allclose(result["similarity"][0]["a"], subspace.similarity(a1, a2), atol=1e-4)
  np.testing.assert_allclose(result["similarity"][0]["b"], subspace.similarity(b1, b2), atol=1e-4)
  row = next(e for e in result["amplification"] if (e["member"], e["matrix"]) == ("r4", "attn/o"))
  delta = np.asarray(nodes[1].delta()[2]).reshape(16, 16)
  w = np.asarray(base["layers"]["attn"]["o"]["kernel"][2]).reshape(16, 16)
  u, s, v = np.linalg.svd(delta)
  np.testing.assert_allclose(row["change"], np.linalg.norm(delta), rtol=1e-5)
  np.testing.assert_allclose(row["weight"], np.linalg.norm(w), rtol=1e-5)
  np.testing.assert_allclose(row["of_change"], np.linalg.norm(u[:, :4].T @ w @ v[:4].T), rtol=1e-4)


@pytest.mark.slow
def test_chosen_matrices_layers_and_pairs(base):
  members = {f"seed{s}": trained(base, s, rank=2, targets="all-linear") for s in range(3)}
  result = subspace.analyse(members, base, matrices=("v", "mlp"), layers=(0, 3), pairs=[("seed0", "seed2")])
  found = {(e["matrix"], e["layer"]) for e in result["similarity"]}
  assert found == {(m, i) for m in ("attn/v", "mlp/gate", "mlp/up", "mlp/down") for i in (0, 3)}
  assert {tuple(e["members"]) for e in result["similarity"]} == {("seed0", "seed2"), ("random", "random")}
  assert len(result["amplification"]) == 3 * 4 * 2


def test_parts_of_fused_matrices():
  base = transformer.init(FUSED, jax.random.key(0))
  result = subspace.analyse({"a": trained(base, 1, rank=2, targets="q")}, base)
  (row,) = result["amplification"]
  q = np.asarray(base["layers"]["attn"]["qkv"]["kernel"][1, :, :4])
  assert row["matrix"] == "attn/qkv/q" and result["similarity"] == []
  np.testing.assert_allclose(row["weight"], np.linalg.norm(q), rtol=1e-5)


def test_a_start_elsewhere_is_no_change(base):
  """The directions of PiSSA are those of what it has learned, not of the part of W that it starts from."""
  params = trained(base, 1, method=pissa, rank=2, targets="q")
  (row,) = subspace.analyse({"a": params}, base)["amplification"]
  node = tree.flatten(params, is_leaf=weights.is_node)["layers/attn/q/kernel"]
  np.testing.assert_allclose(row["change"], np.linalg.norm(node.delta()[2]), rtol=1e-4)
  other = trained(base, 2, rank=3, targets="q")
  (e, _) = subspace.analyse({"a": params, "b": other}, base)["similarity"]
  u, s, _ = np.linalg.svd(np.asarray(node.delta()[2]).reshape(16, 16))
  a = np.asarray(tree.flatten(other, is_leaf=weights.is_node)["layers/attn/q/kernel"].a[2])
  np.testing.assert_allclose(e["a"], subspace.similarity(u[:, :4] * s[:4], a), atol=1e-3)


def test_quantities_do_not_depend_on_alpha(base):
  """Directions are the same, and the change is as much larger."""
  members = {f"{alpha}": trained(base, 1, rank=2, targets="q", alpha=alpha) for alpha in (2.0, 8.0)}
  result = subspace.analyse(members, base)
  np.testing.assert_allclose(result["similarity"][0]["b"], 1)
  small, large = result["amplification"]
  np.testing.assert_allclose(large["factor"], 4 * small["factor"], rtol=1e-6)


@pytest.mark.slow
def test_heat_map_and_table(base):
  members = {f"r{r}": trained(base, r, rank=r, targets="q,v") for r in (2, 5)}
  result = json.loads(metrics.dumps(subspace.analyse(members, base)))
  for side in "ab":
    assert subspace.heatmap(result, side).startswith(b"\x89PNG")
  many = [{**e, "members": [str(i), "x"]} for i in range(40) for e in result["similarity"][:1]]
  assert subspace.heatmap({"similarity": many}).startswith(b"\x89PNG")
  text = subspace.amplification_table(result)
  assert text.count("\n| r2 |") == 2 and "| attn/q, layer 2 | 5 |" in text
  assert "| 61.95 | 6.91 | 0.32 | 21.67 | 0.02 | 21.59 |" in text and "| 1.90 | 37.71 | 0.33 | 1.88 |" in text


def test_what_cannot_be_analysed(base):
  good = trained(base, 1, rank=2, targets="q")
  untrained, _ = lora.init(jax.random.key(0), base, targets="q")
  elsewhere = trained(base, 1, rank=2, targets="q", layers_to_transform=[0])
  for members, kw, message in (
    ({"full": base}, {}, "'full' has no LoRA"),
    ({"a": good, "b": trained(base, 1, rank=2, targets="v")}, {}, "no matrix is adapted in all of a, b"),
    ({"a": good}, {"matrices": ("k",)}, "matrix .k. is not adapted in all members, which share layers.attn.q"),
    ({"a": good}, {"layers": (4,)}, "layer 4 of layers/attn/q/kernel: there are 0 to 3"),
    ({"a": good, "b": elsewhere}, {}, "layer 2 .* not adapted in all"),
    ({"a": good}, {"pairs": [("a", "bb")]}, "unknown member 'bb'"),
    ({"a": untrained}, {}, "a: layers/attn/q/kernel is not trained"),
  ):
    with pytest.raises(errors.UserError, match=message):
      subspace.analyse(members, base, **kw)
  with pytest.raises(errors.UserError, match="two members"):
    subspace.heatmap({"similarity": []})
  assert math.isnan(subspace.amplification(np.eye(3), np.zeros((3, 1)), np.zeros((1, 3)))["factor"])
