"""One thread for torch: the machines that run this have few cores, and share them."""

import torch

torch.set_num_threads(1)
