"""Which weight matrices should LoRA adapt under one budget of parameters? Hu et al. 2021, table 5.

https://arxiv.org/abs/2106.09685. Seven choices of attention matrices, at ranks that give each the same number of
trained parameters if the matrices have one shape; three seeds each: 21 members, one program.

Command: python -m experiments.run --config configs/lora_table5.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline.
  `configs/lora_table5.py` is the same ablation on the paper's data, MNLI, which tensorflow_datasets downloads, with
  SmolLM2-1.7B from the hub, as the paper's GPT-3 175B is not public. Not run yet.
Hardware: one NVIDIA H200: 30 s for the whole table, of which the 200 steps are 14 s.
Expected (smol, mean of 3 seeds): Wq 83.4, Wk 82.5, Wv 84.8, Wo 84.8, Wq Wk 84.1, Wq Wv 85.4, all four 85.5;
  experiments/results/lora_table5.
Published (GPT-3 175B): MNLI 91.0 90.8 91.0 91.3 91.3 91.3 91.7, WikiSQL 70.4 70.0 73.0 73.2 71.4 73.7 73.7.
"""

from configs import common

COLUMNS = {"q": "Wq", "k": "Wk", "v": "Wv", "o": "Wo", "q,k": "Wq Wk", "q,v": "Wq Wv", "q,k,v,o": "all four"}
RANKS = (8, 8, 8, 8, 4, 4, 2)
PUBLISHED = {
  "WikiSQL, GPT-3 175B": (70.4, 70.0, 73.0, 73.2, 71.4, 73.7, 73.7),
  "MNLI, GPT-3 175B": (91.0, 90.8, 91.0, 91.3, 91.3, 91.3, 91.7),
}


def get_config(size: str = ""):
  config = common.get_sweep(size)
  config.optim.learning_rate = 2e-4 if not size else 1e-3
  config.method.alpha = 16.0
  config.sweep = {
    "zip": {"method": {"targets": tuple(COLUMNS), "rank": RANKS}},
    "product": {"train": {"seed": (0, 1, 2)}},
  }
  config.table = {
    "paper": "Hu et al. 2021, table 5",
    "metric": "accuracy",
    "columns": "method.targets",
    "column_labels": tuple(COLUMNS.items()),
    "published": {k: {"": tuple(zip(COLUMNS.values(), v, strict=True))} for k, v in PUBLISHED.items()},
  }
  return config
