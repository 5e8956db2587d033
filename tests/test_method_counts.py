"""How many numbers methods train: what papers print, and what their definitions give."""

import dataclasses

import jax
import pytest

from lora_jax import families, methods, tree
from lora_jax.model import transformer
from tests.method_cases import KEY, model


def shapes_of(model_type, hf, method, **choices):
  """(what a method trains, a whole tree) as shapes, nothing allocated."""
  config = dataclasses.replace(families.get(model_type).config({"model_type": model_type, **hf}), **choices)
  static = []

  def run(params):
    params, mask = methods.init(KEY, params, method)
    static.append(mask)
    return params

  params = jax.eval_shape(run, transformer.shapes(config))
  return tree.size(tree.split(params, static[0])[0])


ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
PRINTED = {
  # Hu et al. 2021, table 2 prints 0.3M, 0.8M; table 3 0.35M; table 5 18M; figures are those of the code.
  "RoBERTa base, r 8 on q, v": (
    294_912,
    "roberta",
    ROBERTA | dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    {"name": "lora", "rank": 8, "targets": "q,v"},
  ),
  "RoBERTa large, r 8 on q, v": (
    786_432,
    "roberta",
    ROBERTA | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    {"name": "lora", "rank": 8, "targets": "q,v"},
  ),
  "GPT-2 M, r 4 on q, v": (
    393_216,
    "gpt2",
    dict(vocab_size=50257, n_embd=1024, n_layer=24, n_head=16),
    {"name": "lora", "rank": 4, "targets": "q,v"},
  ),
  "GPT-3 175B, r 4 on q, v": (
    18_874_368,
    "gpt2",
    dict(vocab_size=50257, n_embd=12288, n_layer=96, n_head=96, n_positions=2048),
    {"name": "lora", "rank": 4, "targets": "q,v"},
  ),
  "GPT-3 175B, r 8 on q": (
    18_874_368,
    "gpt2",
    dict(vocab_size=50257, n_embd=12288, n_layer=96, n_head=96, n_positions=2048),
    {"name": "lora", "rank": 8, "targets": "q"},
  ),
  "Llama 2 13B, r 2 on q, k, v, o": (
    3_276_800,
    "llama",
    dict(vocab_size=32000, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824),
    {"name": "lora", "rank": 2, "targets": "q,k,v,o"},
  ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_counts_that_papers_print(name):
  expected, model_type, hf, method = PRINTED[name]
  choices = {"head": "classification"} if model_type == "roberta" else {}
  assert shapes_of(model_type, hf, method, **choices) == expected


V, D, L, N, K, H, F = 61, 16, 2, 4, 2, 4, 24  # of LLAMA
NORMS = (2 * L + 1) * D
ALL = 2 * V * D + L * (D * (2 * N + 2 * K) * H + 3 * D * F) + NORMS
PAIRS = D + N * H + D + F  # of one rank on q and up
LSTM = 4 * (D // 2) * (D + D // 2 + 1)  # a direction of a layer, half as wide as the embedding
# name: (keywords, count by the paper's definition).
FORMULAS = {
  "lora": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "rslora": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "lora_plus": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "pissa": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "olora": ({"rank": 3, "targets": "q,up"}, L * 3 * PAIRS),
  "relora": ({"rank": 3, "targets": "q,up", "also": "norm/"}, L * 3 * PAIRS + NORMS),
  "dora": ({"rank": 3, "targets": "q,up"}, L * (3 * PAIRS + N * H + F)),
  "adalora": ({"init_r": 3, "target_r": 2, "targets": "q,up"}, L * 3 * (PAIRS + 2)),
  "lora_fa": ({"rank": 3, "targets": "q,up"}, L * 3 * (N * H + F)),
  "vera": ({"rank": 5, "targets": "q,up"}, L * (2 * 5 + N * H + F)),
  "loha": ({"rank": 3, "targets": "q"}, L * 2 * 3 * (D + N * H)),
  "lokr": ({"rank": 2, "targets": "up"}, L * (4 * 4 + 2 * (4 + 6))),  # D = 4 * 4, F = 4 * 6; the larger of low rank
  "intrinsic": ({"dimension": 40, "layer_scales": True}, 40),
  "ia3": ({}, L * (2 * K * H + F)),
  "bitfit": ({}, L * (N * H + 2 * K * H + D + 2 * F + D)),  # of all matrices: none had one
  "norms": ({}, NORMS),
  "houlsby": ({"size": 5}, L * 2 * (2 * 5 * D + 5 + D) + NORMS),
  "pfeiffer": ({"size": 5}, L * (2 * 5 * D + 5 + D)),
  "parallel": ({"size": 5}, L * (2 * 5 * D + 5 + D)),
  "prompt_tuning": ({"length": 7}, 7 * D),
  "p_tuning": ({"length": 7, "encoder": "lstm", "hidden": D // 2}, 7 * D + 2 * 2 * LSTM + 2 * (D * D + D)),
  "prefix_tuning": ({"length": 7}, L * 2 * 7 * K * H),
  "p_tuning_v2": ({"length": 7, "mlp": True}, 7 * D + D * D + D + (D + 1) * L * 2 * K * H),
  "full": ({}, ALL),
  "galore": ({"rank": 4}, ALL),
  "partial": ({"layers": 1, "also": "^norm/"}, D * (N + K + K + N) * H + 3 * D * F + 2 * D + D),
  "tokens": ({"ids": [1, 2, 3]}, 3 * D),
}


def test_formulas_are_of_methods_that_there_are():
  assert FORMULAS.keys() <= set(methods.names())


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_are_those_of_the_formulas(name):
  keywords, expected = FORMULAS[name]
  params, mask = methods.init(KEY, model("llama").params, {"name": name, **keywords})
  assert methods.size(params, mask) == expected
