"""How many soft tokens does prompt tuning need? Lester et al. 2021, figure 3a.

https://arxiv.org/abs/2104.08691. Prompts of 1 to 150 tokens, which start as the embeddings of the labels and then of
other tokens of the vocabulary; three seeds each. Each length is a group, as it has shapes of its own.

Command: python -m experiments.run --config configs/prompt_length.py:smol
  SmolLM2-135M-Instruct on Rotten Tomatoes sentences, from packages: runs offline; 12 members in 4 groups. Its 200 steps
  are few: the paper has 30,000.
  `configs/prompt_length.py` is 15 members in 5 groups with Flan-T5-base from the hub and RTE, a task that SuperGLUE and
  GLUE share. Not run yet. Flan-T5 has learned instructions, RTE's among them, and so needs a prompt less than the T5
  1.1 of the paper, which was adapted to language modelling. --config.model.name=DIR takes that from a directory.
Hardware: one NVIDIA H200: 47 s (smol), at most 3.1 GiB.
Expected (smol, mean of 3 seeds): 74.2 ± 5.2, 81.0 ± 2.1, 80.4 ± 4.5 and 61.0 ± 18.4 with 1, 5, 20 and 100 tokens. With
100 tokens two of the three seeds guess (49.3 and 51.5, at a loss of 0.7), and one reaches 82.2.
Published: only a figure. SuperGLUE rises much from 1 to 20 tokens and hardly beyond; T5-XXL does well with one token.
"""

from configs import common

LENGTHS = (1, 5, 20, 100, 150)


def get_config(size: str = ""):
  config = common.get_sweep(size)
  lengths = LENGTHS[:-1] if size else LENGTHS
  config.method = {"name": "prompt_tuning", "length": 20, "init": "labels", "top": 5000}
  config.optim.update({"name": "adafactor", "learning_rate": 0.3, "schedule": "constant", "warmup": 0.0})
  config.optim.weight_decay = 1e-5
  if size:
    config.data.seq_len = config.eval.seq_len = 192  # a sentence must fit beside the longest prompt
  else:
    config.model.name = "hf:google/flan-t5-base"
    config.task = {"name": "glue", "subset": "rte"}
    config.data.seq_len = config.eval.seq_len = 512
    config.data.target_len = 16
    config.train.steps = 30_000
    config.train.checkpoint_every = 5000
    config.eval.examples = 277
  config.sweep = {"product": {"method": {"length": lengths}, "train": {"seed": (0, 1, 2)}}}
  config.table = {
    "paper": "Lester et al. 2021, figure 3a",
    "metric": "accuracy",
    "columns": "method.length",
    "x": "method.length",
    "log": True,
  }
  return config
