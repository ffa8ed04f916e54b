"""What the server of `warm` imports, so that none of its forks does; nothing here may start a thread."""

import gc

import datasets  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest  # noqa: F401
import pytorch_optimizer  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import evaluate  # noqa: F401
import plot_metrics  # noqa: F401
import run.session
import run.stages  # noqa: F401
import train  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # 0.8 s of compiled patterns, made once
gc.collect()
gc.freeze()  # no fork walks through, and so copies, what is imported here
