"""GPT-2 medium describes restaurants: LoRA by rank, and other methods. Hu et al. 2021, tables 18 and 3.

https://arxiv.org/abs/2106.09685, with the hyperparameters of table 11. The texts are of the E2E challenge (Novikova et
al. 2017), scored by BLEU, NIST, METEOR, ROUGE-L and CIDEr; the last three need Java.

Command: python -m experiments.run --config configs/e2e_gpt2.py --config.task.path=DIR
  11 members, one program: the ranks of table 18, all as wide as 1024 in memory. DIR holds the challenge's CSV files.
  `configs/e2e_gpt2.py:methods` is table 3: 21 members in 7 groups, three seeds each. The other methods have the batch
  sizes, epochs and rates of Li and Liang 2021, table 5; all else is as with LoRA. Neither has been run yet.
  `configs/e2e_gpt2.py:smol` is the ablation of ranks on headlines of BBC news articles by SmolLM2-135M-Instruct, from
  packages: runs offline; 12 members, one program.
Hardware: one NVIDIA H200: 3 min 21 s (smol), at most 7 GiB.
Expected (smol, mean of 3 seeds, ranks 1, 4, 16, 64): BLEU 4.5, 3.9, 4.4, 3.9; METEOR 13.4, 13.9, 14.1, 13.7; ROUGE-L
24.7, 25.0, 25.1, 24.6; before training 0.8, 12.5 and 14.8. The only reference is a headline of a few words.
Published (BLEU; the other metrics are in `RANKS` and `METHODS`): by rank, from 1 to 1024 in powers of 2, 68.72 69.17
70.38 69.57 69.61 69.33 69.24 68.73 68.92 68.78 69.37; table 3: full finetuning 68.2, adapters 66.3 (Adapter^L, 0.37M),
68.9 (11.09M) and 67.3 ± 0.6 (Adapter^H), the top two layers 68.1, PreLayer 69.7, LoRA 70.4 ± 0.1. Table 3's LoRA, the
mean of three seeds, is table 18's rank 4.

The paper's length penalty is 0.9. Ours is 0.8, as in the authors' command for this table, which names its output file
after it. Their search always goes on for 64 tokens; ours goes on while a text can still become the best ("never").
"""

from configs import common

METRICS = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
EXAMPLES = 42_061  # of training
RANKS = {
  1: (68.72, 8.7215, 45.65, 70.52, 2.4329),
  2: (69.17, 8.7413, 45.90, 70.52, 2.4639),
  4: (70.38, 8.8439, 46.89, 71.86, 2.5349),
  8: (69.57, 8.7457, 46.36, 71.96, 2.5196),
  16: (69.61, 8.7483, 46.29, 71.77, 2.4985),
  32: (69.33, 8.7736, 46.42, 71.05, 2.5255),
  64: (69.24, 8.7174, 46.51, 71.80, 2.5070),
  128: (68.73, 8.6718, 46.28, 71.27, 2.5030),
  256: (68.92, 8.6982, 46.29, 71.28, 2.5012),
  512: (68.78, 8.6857, 46.37, 71.28, 2.5025),
  1024: (69.37, 8.7495, 46.59, 71.49, 2.5090),
}
LORA = {"name": "lora", "rank": 4, "alpha": 32.0, "dropout": 0.1, "targets": "q,v"}
# name: (row, method, (batch size, epochs, learning rate), published).
METHODS = {
  "full": ("Fine-tuning", {"name": "full"}, (10, 5, 5e-5), (68.2, 8.62, 46.2, 71.0, 2.47)),
  "adapter_small": (
    "Adapter^L, 0.37M",
    {"name": "pfeiffer", "size": 7},
    (5, 10, 8e-5),
    (66.3, 8.41, 45.0, 69.8, 2.40),
  ),
  "adapter": ("Adapter^L, 11.09M", {"name": "pfeiffer", "size": 225}, (5, 5, 5e-5), (68.9, 8.71, 46.1, 71.3, 2.47)),
  "houlsby": (
    "Adapter^H, 11.09M",
    {"name": "houlsby", "size": 112},
    (5, 5, 5e-5),
    ((67.3, 0.6), (8.50, 0.07), (46.0, 0.2), (70.7, 0.2), (2.44, 0.01)),
  ),
  "top2": (
    "FT-Top2",
    {"name": "partial", "layers": 2, "also": "^norm/"},
    (10, 5, 5e-5),
    (68.1, 8.59, 46.0, 70.8, 2.41),
  ),
  "prefix": (
    "PreLayer",
    {"name": "prefix_tuning", "length": 5, "mlp": True},
    (10, 5, 8e-5),
    (69.7, 8.81, 46.1, 71.4, 2.49),
  ),
  "lora": ("LoRA", LORA, (8, 5, 2e-4), ((70.4, 0.1), (8.85, 0.02), (46.8, 0.2), (71.8, 0.1), (2.53, 0.02))),
}


def get_config(size: str = ""):
  """Table 18, or table 3 with "methods", or "smol"."""
  if size not in ("", "methods", "smol"):
    raise KeyError(f"unknown size {size!r}; known: methods, smol, or none")
  config = common.get_sweep("smol" if size == "smol" else "")
  config.method = dict(LORA)
  config.objective.label_smoothing = 0.1
  config.optim.update({"learning_rate": 2e-4, "weight_decay": 0.01})
  config.eval.update({"beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4, "early_stopping": "never"})
  if size == "smol":
    return headlines(config)
  config.model.name = "hf:openai-community/gpt2-medium"
  config.task = {"name": "e2e_nlg", "path": "", "separator": "<|endoftext|>"}
  config.data.update({"batch_size": 8, "seq_len": 512})
  config.optim.update({"warmup": 500, "clip_norm": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-6})
  config.train.update({"steps": steps(8), "log_every": 100, "checkpoint_every": 2000})
  # The test set has 630 descriptions.
  config.eval.update({"examples": 1000, "batch_size": 66, "seq_len": 256, "max_new_tokens": 64})
  return methods(config) if size else ranks(config)


def steps(batch_size: int, epochs: int = 5) -> int:
  """The number of steps in whole epochs."""
  return -(-EXAMPLES // batch_size) * epochs


def ranks(config):
  """Table 18, one seed."""
  config.sweep = {"product": {"method": {"rank": tuple(RANKS)}, "train": {"seed": (0,)}}}
  config.table = by_rank({"GPT-2 medium": rows((str(r), values) for r, values in RANKS.items())})
  return config


def headlines(config):
  """The same on headlines, which are short; the test set is all 183 articles."""
  config.task.name = "bbc_headlines"
  config.data.seq_len = 256
  config.optim.learning_rate = 5e-4
  config.eval.update({"examples": 183, "batch_size": 96, "seq_len": 256, "max_new_tokens": 24, "beams": 4})
  config.sweep = {"product": {"method": {"rank": (1, 4, 16, 64)}, "train": {"seed": (0, 1, 2)}}}
  config.table = by_rank({})
  return config


def by_rank(published: dict) -> dict:
  """Table 18's layout."""
  return {
    "paper": "Hu et al. 2021, table 18",
    "metric": tuple(METRICS),
    "column_labels": tuple(METRICS.items()),
    "rows": "method.rank",
    "published": published,
    "x": "method.rank",
    "log": True,
  }


def methods(config):
  """Table 3."""
  members = {}
  for name, (_, method, (batch_size, epochs, rate), _) in METHODS.items():
    members[name] = {"method": method, "data": {"batch_size": batch_size}, "optim": {"learning_rate": rate}}
    members[name]["train"] = {"steps": steps(batch_size, epochs)}
  config.sweep = {"list": members, "product": {"train": {"seed": (0, 1, 2)}}}
  config.table = {
    "paper": "Hu et al. 2021, table 3",
    "metric": tuple(METRICS),
    "column_labels": tuple(METRICS.items()),
    "rows": "method",
    "row_labels": tuple((common.text(method), label) for label, method, *_ in METHODS.values()),
    "published": {"GPT-2 medium": rows((label, values) for label, *_, values in METHODS.values())},
    "x": "trainable_params",
    "log": True,
    "lines": "method.name",
  }
  return config


def rows(published) -> tuple:
  """Published (label, values) as rows of a table."""
  return tuple((label, tuple(zip(METRICS.values(), values, strict=True))) for label, values in published)
