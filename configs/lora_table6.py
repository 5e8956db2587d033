"""What is the optimal rank of LoRA? Hu et al. 2021, table 6.

https://arxiv.org/abs/2106.09685. Ranks 1 to 64 of Wq, of Wq and Wv, and of all four attention matrices, three seeds
each: 45 members, one program.

Command: python -m experiments.run --config configs/lora_table6.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline.
  `configs/lora_table6.py` is the same ablation on MNLI with SmolLM2-1.7B from the hub. Not run yet.
Hardware: one NVIDIA H200: 51 s (smol).
Expected (smol, mean of 3 seeds): Wq 83.1 to 83.5, Wq Wv 85.1 to 85.6, all four 85.4 to 86.0, whatever the rank;
  experiments/results/lora_table6.
Published (GPT-3 175B, MNLI): Wq 90.7 90.9 91.1 90.7 90.7, Wq Wv 91.3 91.4 91.3 91.6 91.4, all 91.2 91.7 91.7 91.5 91.4.
"""

from configs import common

ROWS = {"q": "Wq", "q,v": "Wq Wv", "q,k,v,o": "all four"}
RANKS = (1, 2, 4, 8, 64)
PUBLISHED = {
  "WikiSQL, GPT-3 175B": (
    (68.8, 69.6, 70.5, 70.4, 70.0),
    (73.4, 73.3, 73.7, 73.8, 73.5),
    (74.1, 73.7, 74.0, 74.0, 73.9),
  ),
  "MNLI, GPT-3 175B": ((90.7, 90.9, 91.1, 90.7, 90.7), (91.3, 91.4, 91.3, 91.6, 91.4), (91.2, 91.7, 91.7, 91.5, 91.4)),
}


def get_config(size: str = ""):
  config = common.get_sweep(size)
  config.optim.learning_rate = 2e-4 if not size else 1e-3
  config.sweep = {"product": {"method": {"targets": tuple(ROWS), "rank": RANKS}, "train": {"seed": (0, 1, 2)}}}
  rows = lambda values: tuple(
    (label, tuple((str(r), x) for r, x in zip(RANKS, row, strict=True)))
    for label, row in zip(ROWS.values(), values, strict=True)
  )
  config.table = {
    "paper": "Hu et al. 2021, table 6",
    "metric": "accuracy",
    "rows": "method.targets",
    "row_labels": tuple(ROWS.items()),
    "columns": "method.rank",
    "published": {k: rows(v) for k, v in PUBLISHED.items()},
    "x": "method.rank",
    "log": True,
    "lines": "method.targets",
  }
  return config
