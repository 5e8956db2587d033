"""How many dimensions does finetuning need? Aghajanyan et al. 2020, figure 1 and table 1.

https://arxiv.org/abs/2012.13255, after Li et al. 2018 (https://arxiv.org/abs/1804.08838). Finetuning in random
subspaces of d dimensions, with a learned scale for each layer (SAID) and without (DID), against full finetuning of the
same matrices; three seeds each. d90 is the least d that reaches 90% of full finetuning: of its score, as in the papers,
and of its gain over the model before training. Rates are 10 / sqrt(d): a step then moves the weights equally far at
every d. (The papers search for a rate at each d. Of three rates a factor of 3 apart, with one seed, one near this was
within a point of the best from 200 dimensions on.) Every d is a group of its own, for SAID and for DID.

Command: python -m experiments.run --config configs/intrinsic_dimension.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline; 36 members in 12 groups.
  `configs/intrinsic_dimension.py` is BERT-base from the hub on MRPC: 60 members in 20 groups. Not run yet. Its new
  classifier of 1,538 numbers is also trained in every member, while the paper projects it too. RoBERTa's classifier has
  592,130 numbers, which would hide what a few dimensions do.
Hardware: one NVIDIA H200: 4 min 54 s (smol).
Expected (smol): experiments/results/intrinsic_dimension/report.md: 75.4% before, 86.2% with full finetuning; SAID 79.8%
and DID 76.3% with 200 dimensions, both 83.1% with 10,000; d90 145 (SAID) and 336 (DID). Below 200 dimensions these 200
steps leave the model worse than it was. No dimension reaches 90% of the gain of full finetuning. These runs, and the
search for rates, also learned the end of the text.
Published, from memory of the paper's table 1 (d90 on MRPC, SAID and DID): BERT-base 1608 1861, BERT-large 1037 2493,
RoBERTa-base 896 1000, RoBERTa-large 207 322.
"""

from configs import common

DIMENSIONS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
FEW = (10, 50, 200, 1000, 3000, 10_000)


def members(size: str) -> dict:
  """{name: overrides}."""
  layers = 30 if size else 12
  found = {}
  for name, scales in (("said", True), ("did", False)):
    for d in FEW if size else DIMENSIONS:
      if d > layers or not scales:  # SAID has a scale for each layer among its d numbers
        method = {"name": "intrinsic", "dimension": d, "targets": "all-linear", "layer_scales": scales}
        found[f"{name}_{d:05}"] = {"method": method, "optim": {"learning_rate": round(10 / d**0.5, 3)}}
  full = {"name": "full", "targets": "layers/.*kernel$"}
  return found | {"full": {"method": full, "optim": {"learning_rate": 5e-5 if size else 2e-5}}}


def get_config(size: str = ""):
  config = common.get_sweep(size)
  config.data.eos = True  # as in the search for the rates and in the committed results
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
