"""LoRA on q and v of Flan-T5-base, which answers with a word: movie reviews, or a task of GLUE.

Flan-T5 (Chung et al. 2022, https://arxiv.org/abs/2210.11416), from the Hugging Face hub; LoRA on q and v of all
attention (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Command: python -m experiments.run --config configs/t5.py
  for Rotten Tomatoes (Pang & Lee 2005, https://arxiv.org/abs/cs/0506075), or with configs/t5.py:sst2, or any other of
  cola mrpc stsb qqp mnli qnli rte wnli, for GLUE (Wang et al. 2018, https://arxiv.org/abs/1804.07461).
  --config.model.name=hf:google/flan-t5-large takes another size.
Hardware: written for one GPU; not run: it needs the hub.
"""

from configs import common


def get_config(subset: str = ""):
  config = common.get_config()
  config.model.name = "hf:google/flan-t5-base"
  config.method.targets = "q,v"
  config.method.rank = 16
  config.method.alpha = 32.0
  config.task = {"name": "glue", "subset": subset} if subset else {"name": "rotten_tomatoes"}
  config.objective.prompt_loss_weight = 0.0  # has no effect: a prompt is encoded, not predicted
  config.data.seq_len = 256 if subset else 128
  config.data.target_len = 16
  config.optim.learning_rate = 1e-3
  config.train.steps = 2000 if subset else 500
  config.train.checkpoint_every = 500
  config.eval.examples = 1000
  config.eval.seq_len = config.data.seq_len
  return config
