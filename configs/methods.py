"""Every method on one task, each with the learning rate that its paper or official code trains with.

Command: python -m experiments.run --config configs/methods.py
  `configs/methods.py:lora,dora,ia3` runs some of them.
Hardware: one NVIDIA H200: 11 minutes, of which training is 3 s a method and the rest compiling and evaluating; in two
  calls, as the first was stopped in the middle of a member, which the second ran again.
Expected: experiments/results/methods/report.md: 75.6% before, from 76.7% (loha) to 86.4% (olora) after.

What is compared: accuracy on 850 test sentences, forgetting (loss on BBC news articles after minus before), trained
parameters, memory and time of a step, size of what is saved. The memory is the compiler's account; where no larger step
had run in a process before, the most that the allocator had handed out was the same to 0.2% (adalora, dora), 6% more
(full) or 10% more (relora). Published rates belong to published numbers of steps: 200 steps are few for prompt tuning
(its paper: 30,000) and for ReLoRA and GaLore, which are for pretraining.
"""

from configs import common

ADAFACTOR = {"name": "adafactor", "schedule": "constant", "warmup": 0.0}
ALL = {"targets": "all-linear"}
LOW_RANK = {"rank": 8, "alpha": 16.0, **ALL}
# name: (method, optimiser). Where a paper trains no language model of this kind, its nearest rate.
METHODS = {
  # Whole weights. Devlin et al. 2018, appendix A.3; Houlsby et al. 2019, section 3.3; Zhao et al. 2024 (GaLore),
  # the paper's rank, rate and scale for SST-2; Lialin et al. 2023 (ReLoRA), README, for pretraining. Rows of the
  # embedding, those of the labels and of what precedes them: no rate for this, LoRA's.
  "full": ({"name": "full"}, {"learning_rate": 2e-5}),
  "partial": ({"name": "partial", "layers": 2}, {"learning_rate": 3e-5}),
  "tokens": ({"name": "tokens", "tokens": (" negative", " positive", ":")}, {"learning_rate": 2e-4}),
  "galore": ({"name": "galore", "rank": 8, "gap": 100, "scale": 2.0}, {"learning_rate": 2e-5}),
  "relora": (
    {"name": "relora", "rank": 8, "alpha": 16.0, "cycle": 100},
    {"learning_rate": 1e-3, "schedule": "cosine_restarts", "cycle": 100, "restart_warmup": 10},
  ),
  # Low rank. LoRA: Hu et al. 2021, table 11. LoRA+: GPT-2 script. DoRA: LLaMA script. PiSSA: README. From memory of the
  # papers: rsLoRA, VeRA and AdaLoRA (SST-2). LoRA-FA, OLoRA, LoHa and LoKr: no rate for this, LoRA's.
  "lora": ({"name": "lora", **LOW_RANK}, {"learning_rate": 2e-4, "weight_decay": 0.01}),
  "rslora": ({"name": "rslora", **LOW_RANK}, {"learning_rate": 5e-5}),
  "lora_fa": ({"name": "lora_fa", **LOW_RANK}, {"learning_rate": 2e-4}),
  "lora_plus": ({"name": "lora_plus", **LOW_RANK, "lr_ratio": 10.0}, {"learning_rate": 2e-4}),
  "dora": ({"name": "dora", **LOW_RANK}, {"learning_rate": 2e-4}),
  "pissa": ({"name": "pissa", **LOW_RANK}, {"learning_rate": 2e-5}),
  "olora": ({"name": "olora", **LOW_RANK}, {"learning_rate": 2e-4}),
  "vera": ({"name": "vera", "rank": 256, **ALL}, {"learning_rate": 4e-3}),
  "adalora": (
    {"name": "adalora", "init_r": 12, "target_r": 8, "tinit": 20, "tfinal": 60, **ALL},
    {"learning_rate": 8e-4},
  ),
  "loha": ({"name": "loha", "rank": 8, **ALL}, {"learning_rate": 2e-4}),
  "lokr": ({"name": "lokr", "rank": 8, **ALL}, {"learning_rate": 2e-4}),
  # A subspace. Aghajanyan et al. 2020 searched rates for each d; configs/intrinsic_dimension.py has 10 / sqrt(d).
  "intrinsic": ({"name": "intrinsic", "dimension": 1000, "layer_scales": True, **ALL}, {"learning_rate": 0.32}),
  # Bottlenecks. Houlsby et al. 2019, section 3.2; Pfeiffer et al. 2021; He et al. 2022, table 7.
  "houlsby": ({"name": "houlsby"}, {"learning_rate": 3e-4}),
  "pfeiffer": ({"name": "pfeiffer"}, {"learning_rate": 1e-4}),
  "parallel": ({"name": "parallel"}, {"learning_rate": 1e-4}),
  # Scales and biases. Liu et al. 2022 (T-Few), appendix B; Ben Zaken et al. 2021, official code; T-Few's norms.
  "ia3": ({"name": "ia3"}, {"learning_rate": 3e-3, **ADAFACTOR, "schedule": "linear", "warmup": 0.06}),
  "bitfit": ({"name": "bitfit"}, {"learning_rate": 1e-3}),
  "norms": ({"name": "norms"}, {"learning_rate": 3e-4, **ADAFACTOR}),
  # Soft prompts. Lester et al. 2021, section 3.2; Li and Liang 2021, table 5 (E2E); Liu et al. 2021, official code; Liu
  # et al. 2022 (P-tuning v2), official scripts.
  "prompt_tuning": ({"name": "prompt_tuning", "length": 20, "init": "labels"}, {"learning_rate": 0.3, **ADAFACTOR}),
  "prefix_tuning": ({"name": "prefix_tuning", "length": 10, "mlp": True}, {"learning_rate": 8e-5}),
  "p_tuning": ({"name": "p_tuning", "length": 9, "encoder": "lstm"}, {"learning_rate": 1e-5}),
  "p_tuning_v2": ({"name": "p_tuning_v2", "length": 20}, {"learning_rate": 5e-3}),
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
  chosen = names.split(",") if names else METHODS
  unknown = [n for n in chosen if n not in METHODS]
  if unknown:
    raise KeyError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
  config.sweep = {"list": {n: {"method": METHODS[n][0], "optim": METHODS[n][1]} for n in chosen}}
  return config
