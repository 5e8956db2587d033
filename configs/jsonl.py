"""Supervised finetuning on your own file: lines of {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}.

Command: python -m experiments.run --config configs/jsonl.py:data.jsonl
Hardware: any; time and score depend on the file. A tenth of the prompts is held out for each of validation and test
unless --config.task.validation_path and --config.task.test_path are given.
"""

from configs import common


def get_config(path: str):
  config = common.get_config()
  config.task.name = "jsonl"
  config.task.path = path
  config.data.pack = True
  config.data.seq_len = 1024
  config.data.batch_size = 8
  config.eval.examples = 100
  config.eval.batch_size = 16
  return config
