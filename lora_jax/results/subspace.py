"""What LoRA has learned, by its directions: section 7 of Hu et al. 2021, https://arxiv.org/abs/2106.09685.

How much the subspaces of two adapters overlap (section 7.2, figures 3 and 4), and how much an adapter amplifies the
directions that it changes, relative to the pretrained weight (section 7.3, table 7). The paper's A is [r, d], and its
right-singular vectors are directions of the input. Ours is [d, r], so they are its left-singular vectors.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import errors, tree, weights
from lora_jax.model import architecture
from lora_jax.results import plots, report
from lora_jax.weights import fused

MOST_ROWS = 12  # of pairs in a heat map
# Table 7: layer 48 of GPT-3 175B, W_q.
PUBLISHED = (
  {"rank": 4, "weight": 61.95, "change": 6.91, "of_change": 0.32, "of_weight": 21.67, "of_random": 0.02},
  {"rank": 64, "weight": 61.95, "change": 3.57, "of_change": 1.90, "of_weight": 37.71, "of_random": 0.33},
)


def directions(a: np.ndarray) -> np.ndarray:
  """Orthonormal columns [..., D, r] that span the columns of a [..., D, R], by falling singular value.

  r is the rank of a. For stacked matrices it is the largest rank; columns beyond a matrix's own rank are nan.
  """
  u, s, _ = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
  real = s > s[..., :1] * max(a.shape[-2:]) * np.finfo(np.float32).eps
  r = int(real.sum(-1).max(initial=0))
  return np.where(real[..., None, :], u, np.nan)[..., :r]


def similarity(a1: np.ndarray, a2: np.ndarray) -> np.ndarray:
  """phi(i, j) for all i <= r1 and j <= r2: how much the top i directions of one and the top j of the other overlap.

  `||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j)`, from 0, orthogonal, to 1, one in the other (equation 4).

  Args:
    a1, a2: [..., D, R1] and [..., D, R2], whose columns are the directions; stacked alike. For the outputs of LoRA
      give `b` transposed.

  Returns:
    [..., r1, r2] for the ranks that `directions` finds; nan beyond the own ranks of stacked matrices.
  """
  overlap = np.square(np.swapaxes(directions(a1), -1, -2) @ directions(a2))
  i, j = (1 + np.arange(n) for n in overlap.shape[-2:])
  return np.clip(overlap.cumsum(-1).cumsum(-2) / np.minimum(i[:, None], j), 0, 1)


def product_svd(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The SVD (u [I, R], s [R], v [R, O]) of the product of a [I, R] and b [R, O], which is never formed."""
  (qa, ra), (qb, rb) = np.linalg.qr(np.asarray(a, np.float64)), np.linalg.qr(np.asarray(b, np.float64).T)
  u, s, v = np.linalg.svd(ra @ rb.T, full_matrices=False)
  return qa @ u, s, v @ qb.T


def amplification(
  w: np.ndarray,
  a: np.ndarray,
  b: np.ndarray,
  rank: int | None = None,
  seed: int = 0,
  spectrum: np.ndarray | None = None,
) -> dict[str, float]:
  """A column of table 7 for the change `a b` of a weight.

  Args:
    w: [I, O]; a: [I, R]; b: [R, O], scaled.
    rank: how many directions U and V have: by default, and at most, the rank of the change.
    spectrum: singular values of w, if they are known.

  Returns:
    `rank`; `weight` and `change`, the Frobenius norms of both; `of_change`, `of_weight` and `of_random`, which are
    `||U^T W V^T||_F` for the top singular vectors U and V of the change, the weight and a Gaussian matrix; and
    `factor`, by which the change amplifies its directions, `change / of_change`.
  """
  w = np.asarray(w, np.float64)
  u, s, v = product_svd(a, b)
  real = int((s > s.max(initial=0) * max(w.shape) * np.finfo(np.float32).eps).sum())
  r = min(real if rank is None else rank, real)
  spectrum = np.linalg.svd(w, compute_uv=False) if spectrum is None else spectrum
  # Singular vectors of a Gaussian matrix are distributed as the Q of a narrow one is.
  rng = np.random.default_rng(seed)
  left, right = (np.linalg.qr(rng.normal(size=(n, r)))[0] for n in w.shape)
  norm = np.linalg.norm
  change, of_change = float(norm(s)), float(norm(u[:, :r].T @ w @ v[:r].T))
  return {
    "rank": r,
    "weight": float(norm(w)),
    "change": change,
    "of_change": of_change,
    "of_weight": float(norm(spectrum[:r])),
    "of_random": float(norm(left.T @ w @ right)),
    "factor": change / of_change if of_change else math.nan,
  }


def analyse(
  members: Mapping[str, Any],
  base: Any,
  *,
  matrices: Sequence[str] = (),
  layers: Sequence[int] = (),
  pairs: Sequence[tuple[str, str]] | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Similarities of members and the rows of table 7, as JSON.

  Args:
    members: {name: a model's parameters with `weights.LoRA` nodes}.
    base: the pretrained parameters; one layer at a time is made dense.
    matrices: steps ("q", "mlp") of the names of leaves, or regexes found in them; () is every matrix that all members
      adapt.
    layers: indices; () is the middle one, as in the paper. A matrix outside the layers has no index.
    pairs: of names; None is all pairs.
    seed: of the random matrices.

  Returns:
    `similarity`: for each pair, matrix and layer `{"members", "matrix", "layer", "a", "b"}`, phi of the directions of
    input and output, and of a pair of Gaussian matrices, whose members are "random"; `amplification`: for each member,
    matrix and layer what `amplification` gives.

  Raises:
    UserError: the members share no such matrix, or there is no such layer or member.
  """
  found = {name: _lora(params, name) for name, params in members.items()}
  pairs = list(itertools.combinations(found, 2)) if pairs is None else [tuple(p) for p in pairs]
  for name in itertools.chain(*pairs):
    errors.choose(name, found, "member")
  first = next(iter(members))
  shared = [k for k in found[first] if all(k in nodes for nodes in found.values())]
  if not shared:
    raise errors.UserError(f"no matrix is adapted in all of {', '.join(found)}")
  names = _chosen(shared, matrices)
  originals = fused.flatten(fused.like(base, members[first]))
  rng = np.random.default_rng(seed)
  out: dict[str, Any] = {"similarity": [], "amplification": []}
  for name, layer in _places(names, found, layers):
    index = () if layer is None else (layer,)
    factors = {k: _factors(nodes[name], index, f"{k}: {name}") for k, nodes in found.items()}
    place = {"matrix": label(name), "layer": layer}
    compared = [((one, two), factors[one], factors[two]) for one, two in pairs]
    for _, one, two in compared[:1]:
      compared.append((("random", "random"), *([rng.normal(size=x.shape) for x in ab] for ab in (one, two))))
    for who, (a1, b1), (a2, b2) in compared:
      phi = {"a": _json(similarity(a1, a2)), "b": _json(similarity(b1.T, b2.T))}
      out["similarity"].append({"members": list(who), **place, **phi})
    w = np.asarray(weights.dense(jax.tree.map(lambda x: x[index], originals[name])), np.float32)
    w = w.reshape(len(factors[first][0]), -1)
    spectrum = np.linalg.svd(w, compute_uv=False)
    for member, (a, b) in factors.items():
      out["amplification"].append({"member": member, **place, **amplification(w, a, b, seed=seed, spectrum=spectrum)})
  return out


def _lora(params: Any, member: str) -> dict[str, weights.LoRA]:
  flat = fused.flatten(params).items()
  found = {k: w for k, w in flat if isinstance(w, weights.LoRA) and not w.n_experts_axes()}
  if not found:
    raise errors.UserError(f"member {member!r} has no LoRA, so there are no directions to compare")
  return found


def _chosen(names: Sequence[str], matrices: Sequence[str]) -> list[str]:
  """The names that have a word as a step, or in which a regex is found."""
  found = [k for k in names if not matrices]
  for m in matrices:
    pattern = tree.compile_pattern(rf"(^|/){m}(/|$)" if re.fullmatch(r"\w+", m) else m)
    hits = [k for k in names if pattern.search(k)]
    if not hits:
      raise errors.UserError(f"matrix {m!r} is not adapted in all members, which share {', '.join(names)}")
    found += hits
  return list(dict.fromkeys(found))


def label(name: str) -> str:
  """What a leaf is called in tables: `attn/q`."""
  return name.replace("layers/", "").replace("/kernel", "")


def _places(names, found, layers) -> list[tuple[str, int | None]]:
  """(leaf, layer or None) of every matrix to look at; a layer that some member does not adapt is an error."""
  places = []
  for name in names:
    if not architecture.stacked(name):
      places.append((name, None))
      continue
    ranks = np.min([np.asarray(nodes[name].rank) for nodes in found.values()], 0)
    for layer in layers or (len(ranks) // 2,):
      if not 0 <= layer < len(ranks):
        raise errors.UserError(f"layer {layer} of {name}: there are 0 to {len(ranks) - 1}")
      if not ranks[layer]:
        raise errors.UserError(f"layer {layer} of {name} is not adapted in all members; give other layers")
      places.append((name, layer))
  return places


def _factors(node: weights.LoRA, index: tuple, where: str) -> tuple[np.ndarray, np.ndarray]:
  """(a [I, R], scale * b [R, O]) of one layer; of LoRA that does not start at zero, the factors of its change."""
  a, b, scale = node.layer(index)
  a, b = a.reshape(-1, a.shape[-1]).astype(np.float64), scale * b.reshape(len(b), -1).astype(np.float64)
  if node.start is not None:
    u, s, v = product_svd(a, b)
    r = int((s > s.max() * len(a) * np.finfo(np.float32).eps).sum())
    a, b = u[:, :r] * np.sqrt(s[:r]), np.sqrt(s[:r, None]) * v[:r]
  if not b.any():
    raise errors.UserError(f"{where} is not trained: LoRA changes nothing there")
  return a, b


def _json(phi: np.ndarray) -> list[list[float]]:
  return np.round(phi, 4).tolist()


def heatmap(result: Mapping[str, Any], side: str = "a") -> bytes:
  """A PNG of similarities as in figure 3: a row of panels for each of at most 12 pairs, a column for each matrix.

  Args:
    result: of `analyse`.
    side: "a", directions of the input, or "b", of the output.
  """
  errors.choose(side, dict.fromkeys("ab"), "side of LoRA")
  entries = result["similarity"]
  if not entries:
    raise errors.UserError("a heat map of similarities needs two members or more")
  columns = list(dict.fromkeys((e["matrix"], e["layer"]) for e in entries))
  pairs = list(dict.fromkeys(tuple(e["members"]) for e in entries))
  if len(pairs) > MOST_ROWS:
    pairs = [*pairs[: MOST_ROWS - 1], pairs[-1]]
  by_place = {(tuple(e["members"]), e["matrix"], e["layer"]): e[side] for e in entries}
  places = [(p, *c) for p in pairs for c in columns]
  images = [(m if layer is None else f"{m}, layer {layer}", by_place[p, m, layer]) for p, m, layer in places]
  ys, xs = zip(*(p for p, _, _ in places), strict=True)
  return plots.heatmaps(images, [f"j, {x}" for x in xs], [f"i, {y}" for y in ys], len(columns), "similarity φ(i, j)")


def amplification_table(result: Mapping[str, Any]) -> str:
  """Table 7 in Markdown, its columns as rows; the published ones come last."""
  header = ["", "matrix", "r", "‖W‖", "‖ΔW‖", "‖UᵀWVᵀ‖ of ΔW", "of W", "of random", "amplification"]
  keys = ("weight", "change", "of_change", "of_weight", "of_random")
  ours = [
    (e["member"], e["matrix"] if e["layer"] is None else f"{e['matrix']}, layer {e['layer']}", e)
    for e in result["amplification"]
  ]
  rows = [
    [
      who,
      where,
      str(e["rank"]),
      *(f"{e[k]:.2f}" for k in keys),
      f"{e['change'] / e['of_change']:.2f}" if e["of_change"] else "-",
    ]
    for who, where, e in (*ours, *(("*GPT-3 175B, table 7*", "Wq, layer 48", e) for e in PUBLISHED))
  ]
  return report.table(header, rows)
