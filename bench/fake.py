"""Triton launches that do nothing, so that the Python around them can run, be counted and be timed without a GPU.

    with fake_gpu() as counter:            the whole of Triton's own launch, up to the driver: for timing
        batch.compute_step(8, whole=True)
        counter["_store_kernel"]           how often it was launched
    with no_kernels() as launches:         kernels replaced by a list, on any tensors, fake ones included: for tests
        batch.compute_step(8, whole=True)
        launches[0]                        ("_rms_norm_fwd_kernel", its grid, shapes of tensors and numbers)

Tensors are a CPU's. What the kernels would have written stays as it was allocated, so no number that comes out means
anything. Ask for impl="triton": by default a CPU's tensors take the PyTorch path.
"""

import contextlib
import importlib
import os
from collections import Counter
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels import tiles

MODULES = "kernels.attention", "kernels.decode", "kernels.logp", "kernels.pointwise"


LAUNCHES = Counter()  # of fake_gpu: one for the process, since Triton keeps what it has compiled with its launcher


class Driver:
    """What Triton asks of a driver to compile for a GPU and to launch there."""

    def __init__(self, capability):
        self.capability, self.utils = capability, self

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name, kernel, shared, device):
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads of a block at most

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        def launch(*args):
            LAUNCHES[metadata.name] += 1
        return launch


class Kernel:
    """In a kernel's place: lists its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            arguments = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args]
            self.launches.append((self.name, grid, *arguments, *sorted(options.items())))
        return launch


@contextlib.contextmanager
def fake_gpu(capability=90):
    """An H100 that launches nothing. Kernels are compiled for it once a process (and kept in Triton's cache)."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels are not launched"
    LAUNCHES.clear()
    with on_any_device(capability), mock.patch.object(driver, "_active", Driver(capability)):
        yield LAUNCHES


@contextlib.contextmanager
def no_kernels(capability=90):
    """Every kernel replaced; it need not be one that could be compiled."""
    launches = []
    with on_any_device(capability), contextlib.ExitStack() as patches:
        for module in map(importlib.import_module, MODULES):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patches.enter_context(mock.patch.object(module, name, Kernel(name, launches)))
        yield launches


@contextlib.contextmanager
def on_any_device(capability):
    """The launchers take this machine's device for a GPU of that generation."""
    with mock.patch.object(tiles, "_generation", lambda device: capability), \
            mock.patch.object(tiles, "runs_triton", lambda device, dtype: dtype != torch.float64):
        yield
