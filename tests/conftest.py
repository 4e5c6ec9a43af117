"""Tests run in one thread (RM_TEST_THREADS), since they are many small tensors, and on the CPU, since few need a GPU
and the two-rank tests would look for two; kernels run there in Triton's interpreter.

    RM_TEST_DEVICE=cuda python -m pytest tests/test_kernels.py    the kernels compiled, on the GPU

As on other machines, which sum in other orders; nothing may fail (numpy, which runs the interpreter, has OpenBLAS):

    export ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 DNNL_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
    RM_TEST_THREADS=2 python -m pytest

What takes minutes is marked `long`, and left out unless it is asked for: make test-long, or python -m pytest -m long.
"""

import os

if os.environ.setdefault("RM_TEST_DEVICE", "cpu") == "cuda":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("RM_TEST_THREADS", "1")))


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes, and is left out unless -m asks for it")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture
def mended_interpreter():
    """Kernels on the CPU give what a GPU gives: interpreter.py."""
    from interpreter import mended
    with mended():
        yield
