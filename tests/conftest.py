"""Every test computes on one thread: the runner uses the cores for tests side by side, and sums are the same everywhere."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the commands that tests start

import torch

torch.set_num_threads(1)
