"""Supervised finetuning on your own file: lines of {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}.

Command: python -m experiments.run --config configs/jsonl.py:data.jsonl
  `configs/jsonl.py:data.jsonl,classification` trains a classifier instead, whose labels are the responses in the file.
Hardware: any; time and score depend on the file. A tenth of the prompts is held out for each of validation and test
unless --config.task.validation_path and --config.task.test_path are given.
"""

from configs import common

CLASSIFICATION = ",classification"


def get_config(path: str):
  config = common.get_config()
  config.task.name = "jsonl"
  config.task.path = path.removesuffix(CLASSIFICATION)
  config.data.seq_len = 1024
  config.data.batch_size = 8
  config.eval.examples = 100
  config.eval.batch_size = 16
  if path.endswith(CLASSIFICATION):
    config.objective.name = "classification"
    config.task.labels = "all"
    config.data.seq_len = config.eval.seq_len = 512
    config.data.batch_size = 32
  else:
    config.data.pack = True
  return config
