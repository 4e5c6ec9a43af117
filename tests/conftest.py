"""Tests run single-threaded, since they are many small tensors, and on the CPU, since no test needs a GPU yet and the
two-rank tests would look for two."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

torch.set_num_threads(1)
