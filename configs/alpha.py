"""Does LoRA's alpha matter at a fixed learning rate? Hu et al. 2021, section 4.1.

https://arxiv.org/abs/2106.09685. LoRA adds alpha / rank times its product. The paper says that "tuning alpha is roughly
the same as tuning the learning rate", and keeps alpha at the first rank that was tried. Five alphas by three ranks,
three seeds each: 45 members, one program. If only the scale counts, all ranks are best at the same alpha / rank. With
alpha / sqrt(rank), --config.method.rslora=True, large ranks learn as fast as small ones (Kalajdzievski 2023, rsLoRA,
https://arxiv.org/abs/2312.03732).

Command: python -m experiments.run --config configs/alpha.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline.
  `configs/alpha.py` is the same ablation on MNLI with SmolLM2-1.7B from the hub. Not run yet.
Hardware: one NVIDIA H200: 45 s (smol).
Expected (smol, mean of 3 seeds): 80.8 to 80.9 at alpha 1, 82.6 to 82.9 at 4, 85.3 to 86.5 at 16 and above, whatever the
  rank; best at 256: 86.0, 86.5 and 86.4 for ranks 4, 16 and 64; experiments/results/alpha.
Published: no table. The rsLoRA paper plots perplexity for several ranks.
"""

from configs import common

ALPHAS = (1.0, 4.0, 16.0, 64.0, 256.0)
RANKS = (4, 16, 64)


def get_config(size: str = ""):
  config = common.get_sweep(size)
  config.optim.learning_rate = 2e-4 if not size else 1e-3
  config.sweep = {"product": {"method": {"rank": RANKS, "alpha": ALPHAS}, "train": {"seed": (0, 1, 2)}}}
  config.table = {
    "paper": "Hu et al. 2021, section 4.1",
    "metric": "accuracy",
    "rows": "method.rank",
    "columns": "method.alpha",
    "x": "method.alpha",
    "log": True,
    "lines": "method.rank",
  }
  return config
