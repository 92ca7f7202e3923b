"""What every test needs: no network, one thread, and types and shapes checked on every call."""

import os

# Read when the libraries are imported, so set before.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("diffusify", "beartype.beartype")
