"""Every method on one task, each with the learning rate that its paper or official code trains with.

Command: python -m experiments.run --config configs/methods.py
  `configs/methods.py:lora,dora,ia3` runs some of them.
Hardware: one NVIDIA H200: 11 minutes, of which training is 3 s a method and the rest compiling and evaluating; in two
  calls, as the first was stopped in the middle of a member, which the second ran again.
Expected: experiments/results/methods/report.md: 75.6% before, from 76.7% (loha) to 86.4% (olora) after.

The report compares accuracy on 850 test sentences, forgetting (loss on BBC news articles after minus before), trained
parameters, memory and time of a step, and the size of what is saved. The memory is the compiler's account. Where no
larger step had run in a process before, the most that the allocator had handed out was the same to 0.2% (adalora,
dora), 6% more (full) or 10% more (relora).

The published rates are in the methods' own files, as `OPTIM`; a method without one has LoRA's. Published rates belong
to published numbers of steps: 200 steps are few for prompt tuning (its paper: 30,000) and for ReLoRA and GaLore, which
are for pretraining.
"""

from configs import common
from lora_jax import methods

ALL = {"targets": "all-linear"}
LOW_RANK = {"rank": 8, "alpha": 16.0, **ALL}
CYCLE = 100  # steps between the restarts of ReLoRA
# Keywords of the methods whose defaults are not what this experiment compares.
SETTINGS = {
  **dict.fromkeys(("lora", "rslora", "lora_fa", "dora", "pissa", "olora"), LOW_RANK),
  "lora_plus": {**LOW_RANK, "lr_ratio": 10.0},
  "vera": {"rank": 256, **ALL},
  "adalora": {"init_r": 12, "target_r": 8, "tinit": 20, "tfinal": 60, **ALL},
  "loha": {"rank": 8, **ALL},
  "lokr": {"rank": 8, **ALL},
  "intrinsic": {"dimension": 1000, "layer_scales": True, **ALL},
  "partial": {"layers": 2},
  "tokens": {"tokens": (" negative", " positive", ":")},  # the labels and what precedes them
  "galore": {"rank": 8, "gap": 100, "scale": 2.0},
  "relora": {"rank": 8, "alpha": 16.0, "cycle": CYCLE},
  "prompt_tuning": {"length": 20, "init": "labels"},
  "prefix_tuning": {"length": 10, "mlp": True},
  "p_tuning": {"length": 9, "encoder": "lstm"},
  "p_tuning_v2": {"length": 20},
}
# Keys of config.optim that follow from those keywords.
OPTIM = {
  "relora": {"cycle": CYCLE, "restart_warmup": 10},
  "intrinsic": {"learning_rate": 0.32},  # 10 / sqrt(dimension), as in configs/intrinsic_dimension.py
}


def member(name: str, optim: dict) -> dict:
  """The overrides of a method; `optim` is for those that publish nothing."""
  return {
    "method": {"name": name, **SETTINGS.get(name, {})},
    "optim": optim | getattr(methods.get(name), "OPTIM", {}) | OPTIM.get(name, {}),
  }


def get_config(names: str = ""):
  config = common.get_config()
  config.task.name = "rotten_tomatoes"
  config.objective.prompt_loss_weight = 0.0
  config.objective.chunk = 128
  config.data.batch_size = 32
  config.data.seq_len = 64
  config.train.steps = 200
  config.train.log_every = 20
  config.train.checkpoint_every = 200
  config.eval.examples = 850
  config.eval.batch_size = 128
  config.eval.seq_len = 128
  config.eval.general = "bbc_news"
  config.eval.general_examples = 200
  chosen = names.split(",") if names else methods.names()
  rate = {"learning_rate": config.optim.learning_rate}
  config.sweep = {"list": {name: member(name, rate) for name in chosen}}
  return config
