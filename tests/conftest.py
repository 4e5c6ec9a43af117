"""Tests run single-threaded, since they are many small tensors, and on the CPU, since few need a GPU and the two-rank
tests would look for two; kernels run there in Triton's interpreter.

    RM_TEST_DEVICE=cuda python -m pytest tests/test_kernels.py    the kernels compiled, on the GPU, with bfloat16
"""

import os

if os.environ.setdefault("RM_TEST_DEVICE", "cpu") == "cuda":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import torch  # noqa: E402

torch.set_num_threads(1)
