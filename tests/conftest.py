"""Tests run in one thread (RM_TEST_THREADS), since they are many small tensors, and on the CPU, since few need a GPU
and the two-rank tests would look for two; kernels run there in Triton's interpreter.

    RM_TEST_DEVICE=cuda python -m pytest tests/test_kernels.py    the kernels compiled, on the GPU

As on other machines, which sum in other orders (nothing may fail; MKL and oneDNN take the same hints):

    RM_TEST_THREADS=2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 DNNL_MAX_CPU_ISA=AVX2 python -m pytest
"""

import os

if os.environ.setdefault("RM_TEST_DEVICE", "cpu") == "cuda":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("RM_TEST_THREADS", "1")))
