"""How many dimensions does finetuning need? Aghajanyan et al. 2020, figure 1 and table 1.

https://arxiv.org/abs/2012.13255, after Li et al. 2018 (https://arxiv.org/abs/1804.08838). Finetuning in random
subspaces of d dimensions, with a learned scale for each layer (SAID) and without (DID), against full finetuning of the
same matrices; three seeds each. d90 is the least d that reaches 90% of full finetuning: of its score, as in the papers,
and of what it gains over the model before, which does not count what was there. Rates fall as 1 / sqrt(d), so that a
step moves the weights equally far; those of SAID are lower, as they are of its scales too. Every d is a group of its
own, for SAID and for DID.

Command: python -m experiments.run --config configs/intrinsic_dimension.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline; 36 members in 12 groups.
  `configs/intrinsic_dimension.py` is BERT-base from the hub on MRPC: 60 members in 20 groups. Not run yet. Its
  classifier, 1,538 numbers, is new and trained besides in every member, where the paper projects it too; RoBERTa's has
  592,130, beside which few dimensions say nothing.
Hardware: one NVIDIA H200: 5 min 38 s (smol), with rates of 0.2 / sqrt(d), which were too low: nothing came above 75.
Not run yet with these rates. One seed, 10,000 dimensions: DID 83.9 with 0.1, SAID 82.6 with 0.03 and 83.6 with 0.1; 200
dimensions: SAID 78.2 with 0.1, DID still on its way with 0.1.
Published, from memory of the paper's table 1 (d90 on MRPC, SAID and DID): BERT-base 1608 1861, BERT-large 1037 2493,
RoBERTa-base 896 1000, RoBERTa-large 207 322.
"""

from configs import common

DIMENSIONS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
FEW = (10, 50, 200, 1000, 3000, 10_000)


def members(size: str) -> dict:
  """{name: overrides}."""
  layers, found = 30 if size else 12, {}
  for name, scales, rate in (("said", True, 3), ("did", False, 10)):
    for d in FEW if size else DIMENSIONS:
      if d > layers or not scales:  # SAID has a scale for each layer among its d numbers
        method = {"name": "intrinsic", "dimension": d, "targets": "all-linear", "layer_scales": scales}
        found[f"{name}_{d:05}"] = {"method": method, "optim": {"learning_rate": round(rate / d**0.5, 3)}}
  full = {"name": "full", "targets": "layers/.*kernel$"}
  return found | {"full": {"method": full, "optim": {"learning_rate": 5e-5 if size else 2e-5}}}


def get_config(size: str = ""):
  config = common.get_sweep(size)
  if not size:
    config.model.name = "hf:google-bert/bert-base-uncased"
    config.task = {"name": "glue", "subset": "mrpc"}
    config.objective = {"name": "classification"}
    config.data = {"batch_size": 32, "seq_len": 128}
    config.eval = {"examples": 408, "every": 0, "batch_size": 256, "seq_len": 128}
    config.train.steps = 3000
  config.sweep = {"list": members(size), "product": {"train": {"seed": (0, 1, 2)}}}
  config.table = {
    "paper": "Aghajanyan et al. 2020, figure 1",
    "metric": "accuracy",
    "rows": "method.layer_scales",
    "row_labels": (("True", "SAID"), ("False", "DID"), ("-", "full finetuning")),
    "columns": "method.dimension",
    "column_labels": {"-": "all"},
    "x": "method.dimension",
    "log": True,
    "lines": "method.layer_scales",
    "d90": 0.9,
  }
  return config
