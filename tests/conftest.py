"""How Triton runs in these tests; set before anything imports it, since it reads this then."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
