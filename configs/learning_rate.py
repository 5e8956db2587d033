"""How near must the learning rate be to the best one? LoRA, LoRA+ and full finetuning.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) trained GPT-3 with 40 times the rate of full finetuning. LoRA+
(Hayou et al. 2024, https://arxiv.org/abs/2402.12354) gives B 16 times the rate of A; the table shows the rate of A.
Seven rates, three seeds each: 63 members in 3 groups.

Command: python -m experiments.run --config configs/learning_rate.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline.
  `configs/learning_rate.py` is LoRA and LoRA+ (42 members in 2 groups) on MNLI with SmolLM2-1.7B from the hub. Full
  finetuning is left out, as no GPU holds its copies of that model. Not run yet.
Hardware: one NVIDIA H200: 2 min 22 s (smol), at most 54 GiB and 40 GB of disk. A GPU of 80 GB takes full finetuning in
two groups.
Expected (smol, mean of 3 seeds): the best are LoRA 85.5 at 1e-3, LoRA+ 86.0 at 1e-3, full finetuning 86.9 at 1e-4. At
much higher rates seeds differ widely, and some guess: 71.3 ± 12.0 with LoRA at 1e-2, 60.6 ± 16.9 with LoRA+ at 3e-3.
Published: only figures, of accuracy over both rates (LoRA+).
"""

from configs import common

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LORA = {"rank": 8, "alpha": 16.0, "targets": "q,v"}
METHODS = ({"name": "lora", **LORA}, {"name": "lora_plus", **LORA, "lr_ratio": 16.0}, {"name": "full"})
LABELS = {"lora": "LoRA", "lora_plus": "LoRA+", "full": "full finetuning"}


def get_config(size: str = ""):
  config = common.get_sweep(size)
  methods = METHODS if size else METHODS[:2]
  config.sweep = {"product": {"method": methods, "optim": {"learning_rate": RATES}, "train": {"seed": (0, 1, 2)}}}
  config.table = {
    "paper": "Learning rates",
    "metric": "accuracy",
    "rows": "method.name",
    "row_labels": tuple(LABELS.items()),
    "columns": "optim.learning_rate",
    "x": "optim.learning_rate",
    "log": True,
    "lines": "method.name",
  }
  return config
