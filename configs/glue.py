"""LoRA on a task of GLUE (Wang et al. 2018, https://arxiv.org/abs/1804.07461); scores are of its validation split.

Command: python -m experiments.run --config configs/glue.py:sst2
  with any of cola sst2 mrpc stsb qqp mnli qnli rte wnli in place of sst2. tensorflow_datasets downloads the data.
Hardware: written for one GPU or TPU; not timed and not scored yet.
"""

from configs import common


def get_config(subset: str = "sst2"):
  config = common.get_config()
  config.task.name = "glue"
  config.task.subset = subset
  config.objective.prompt_loss_weight = 0.0
  config.data.seq_len = 256
  config.optim.learning_rate = 5e-4
  config.train.steps = 2000
  config.train.checkpoint_every = 500
  config.eval.examples = 1000
  config.eval.seq_len = 256
  return config
