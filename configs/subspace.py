"""What does LoRA learn? Hu et al. 2021, section 7: figures 3 and 4, table 7.

https://arxiv.org/abs/2106.09685. How much do the directions of adapters of rank 8 and 64, and of two seeds of rank 64,
overlap? How much does an adapter amplify its directions, relative to the pretrained weight? For Wq and Wv of the middle
layer. 4 members, one program. Each has its own seed: with the same seed a small A starts as a part of a large one.

Command: python -m experiments.run --config configs/subspace.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline.
  `configs/subspace.py` is MNLI with SmolLM2-1.7B from the hub. Not run yet.
  --config.table.subspace.layers="(0,12,23)" looks at others.
Hardware: one NVIDIA H200: 14 s (smol).
Expected (smol): experiments/results/subspace; 84.4 to 85.9% accuracy, amplification of q 1.9 at rank 4, 0.05 at 64.
Published (GPT-3 175B, layer 48): the first directions of ranks 8 and 64 overlap by more than 0.5, the others little.
The report has table 7, Wq, below our numbers: amplification 21.59 at rank 4 (from the rounded norms; the text says
21.5), 1.88 at rank 64.
"""

from configs import common

RANKS = {"r04": 4, "r08": 8, "r64": 64, "r64_again": 64}
LABELS = {"r04": "r = 4", "r08": "r = 8", "r64": "r = 64", "r64_again": "r = 64 again"}


def get_config(size: str = ""):
  config = common.get_sweep(size)
  config.optim.learning_rate = 2e-4 if not size else 1e-3
  config.sweep = {"list": {k: {"method": {"rank": r}, "train": {"seed": i}} for i, (k, r) in enumerate(RANKS.items())}}
  config.table = {
    "paper": "Hu et al. 2021, section 7",
    "metric": "accuracy",
    "rows": "name",
    "row_labels": tuple(LABELS.items()),
    "subspace": {"matrices": ("q", "v"), "layers": (), "pairs": (("r08", "r64"), ("r64", "r64_again"))},
  }
  return config
