"""What the server of `tests.support.ranks` imports once, before any rank is forked from it."""

import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")

import torch

torch.set_num_threads(1)

from megasft import host

host.import_megatron()

# What the modules of tests import, whose functions run on ranks.
import hypothesis  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

from tests.support import on_ranks  # noqa: F401

host.prepare()
