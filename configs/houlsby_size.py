"""Adapters or the last layers: what does a trained parameter buy? Houlsby et al. 2019, figure 4.

https://arxiv.org/abs/1902.00751. The figure shows accuracy against trained parameters: finetuning of the last k layers,
bottleneck adapters of several sizes, and the norms alone. Full finetuning is added here. Three seeds each; every size
and every k is a group of its own.

Command: python -m experiments.run --config configs/houlsby_size.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline; 33 members in 11 groups.
  `configs/houlsby_size.py` is as in the paper: 36 members in 12 groups with BERT-base from the hub and MNLI, 3 epochs.
  Not run yet. Rates are from the paper's grids; norms have 1e-3.
Hardware: one NVIDIA H200: 2 min 42 s (smol), at most 9 GiB.
Expected (smol, mean of 3 seeds): adapters of 2, 8, 64 and 256 84.0, 84.8, 85.8 and 86.3; the last layer 77.9, the last
2, 4, 8 and 15 78.5, 78.8, 80.4 and 82.7; norms 84.1; everything 85.2.
Published (BERT-base, MNLI-m validation): the last layer 77.8 ± 0.1 with 9M parameters, adapters of 64 83.7 ± 0.1 with
2M, everything 84.4 ± 0.02; other sizes and k are only drawn.
"""

from configs import common

SIZES = (2, 8, 64, 256)
PUBLISHED = {
  "MNLI-m, BERT-base": {
    "adapters of 64": {"accuracy": (83.7, 0.1), "trainable_params": "2M"},
    "last layer": {"accuracy": (77.8, 0.1), "trainable_params": "9M"},
    "everything": {"accuracy": (84.4, 0.02), "trainable_params": "110M"},
  }
}


def members(size: str) -> dict:
  """{name: (label, method, learning rate)}."""
  last = (1, 2, 4, 8, 15) if size else (1, 2, 4, 6, 9, 12)
  found = {f"houlsby_{m:03}": (f"adapters of {m}", {"name": "houlsby", "size": m}, 3e-4) for m in SIZES}
  found |= {
    f"partial_{k:02}": ("last layer" if k == 1 else f"last {k} layers", {"name": "partial", "layers": k}, 3e-5)
    for k in last
  }
  return found | {
    "norms": ("norms", {"name": "norms"}, 1e-3),
    "full": ("everything", {"name": "full"}, 3e-5 if not size else 2e-5),
  }


def get_config(size: str = ""):
  config = common.get_sweep(size)
  if not size:
    config.model.name = "hf:google-bert/bert-base-uncased"
    config.objective = {"name": "classification"}
    config.data = {"batch_size": 32, "seq_len": 128}
    config.eval = {"examples": 9815, "every": 0, "batch_size": 256, "seq_len": 128}
    config.optim.update({"warmup": 0.1, "weight_decay": 0.01})
    config.train.steps = 33_000
    config.train.checkpoint_every = 5000
  found = members(size)
  config.sweep = {
    "list": {name: {"method": m, "optim": {"learning_rate": rate}} for name, (_, m, rate) in found.items()},
    "product": {"train": {"seed": (0, 1, 2)}},
  }
  config.table = {
    "paper": "Houlsby et al. 2019, figure 4",
    "metric": ("accuracy", "trainable_params"),
    "rows": "method",
    "row_labels": tuple((common.text(method), label) for label, method, _ in found.values()),
    "published": PUBLISHED,
    "x": "trainable_params",
    "log": True,
    "lines": "method.name",
  }
  return config
