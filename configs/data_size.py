"""How many examples does a method need? Hu et al. 2021, table 16.

https://arxiv.org/abs/2106.09685. LoRA, full finetuning, BitFit and IA3 on 100 examples, on 1,000, ... and on all; three
seeds each, which also draw the examples. All have the same number of steps. Each method is a group.

Command: python -m experiments.run --config configs/data_size.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline; 36 members in 4 groups.
  `configs/data_size.py` is 48 members in 4 groups on MNLI with RoBERTa-base from the hub: one GPU holds the 12 copies
  of it that full finetuning needs. Not run yet.
Hardware: one NVIDIA H200: 2 min 29 s (smol), at most 24 GiB.
Expected (smol, mean of 3 seeds, 100 1k 6.8k): LoRA 80.3 83.0 85.4, full 79.9 83.1 85.3, BitFit 79.4 83.7 85.5, IA3 80.0
82.6 83.7; 75.4 before.
Published (GPT-3 175B, MNLI-m, 100 1k 10k 392k): full 60.2 85.8 88.9 89.5, PreEmbed 37.6 75.2 79.5 88.6, PreLayer 48.3
82.5 85.9 89.6, LoRA 63.8 85.6 89.2 91.7.
"""

from configs import common

COLUMNS = {100: "100", 1000: "1k", 10_000: "10k", 392_702: "392k"}
PUBLISHED = {
  "full": (60.2, 85.8, 88.9, 89.5),
  "PreEmbed": (37.6, 75.2, 79.5, 88.6),
  "PreLayer": (48.3, 82.5, 85.9, 89.6),
  "LoRA": (63.8, 85.6, 89.2, 91.7),
}
LABELS = {"lora": "LoRA", "full": "full", "bitfit": "BitFit", "ia3": "IA3"}


def members(size: str) -> dict:
  """{name: overrides}. Rates of RoBERTa-base: Hu et al. 2021, table 9, and the papers of the methods."""
  lora = {"name": "lora", "rank": 8, "alpha": 16.0 if size else 8.0, "targets": "q,v"}
  return {
    "lora": {"method": lora, "optim": {"learning_rate": 1e-3 if size else 5e-4}},
    "full": {"method": {"name": "full"}, "optim": {"learning_rate": 2e-5}},
    "bitfit": {"method": {"name": "bitfit"}, "optim": {"learning_rate": 1e-3}},
    "ia3": {"method": {"name": "ia3"}, "optim": {"name": "adafactor", "learning_rate": 3e-3}},
  }


def get_config(size: str = ""):
  config = common.get_sweep(size)
  if not size:
    config.model.name = "hf:FacebookAI/roberta-base"
    config.objective = {"name": "classification"}
    config.data = {"batch_size": 32, "seq_len": 128}
    config.eval = {"examples": 9815, "every": 0, "batch_size": 256, "seq_len": 128}
  columns = {100: "100", 1000: "1k", 6793: "6.8k"} if size else COLUMNS  # the last is all there are
  config.sweep = {
    "list": members(size),
    "product": {"data": {"train_examples": tuple(columns)}, "train": {"seed": (0, 1, 2)}},
  }
  published = {label: tuple(zip(COLUMNS.values(), row, strict=True)) for label, row in PUBLISHED.items()}
  config.table = {
    "paper": "Hu et al. 2021, table 16",
    "metric": "accuracy",
    "rows": "method.name",
    "row_labels": tuple(LABELS.items()),
    "columns": "data.train_examples",
    "column_labels": tuple((str(n), label) for n, label in columns.items()),
    "published": {"MNLI-m, GPT-3 175B": tuple(published.items())},
    "x": "data.train_examples",
    "log": True,
    "lines": "method.name",
  }
  return config
