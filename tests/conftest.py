"""Tests run single-threaded: they are many small tensors, and the machine may have two cores."""

import torch

torch.set_num_threads(1)
