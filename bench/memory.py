"""draft"""
import sys, time, json, contextlib, weakref
from unittest import mock
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import grpo
from bench.fake import no_kernels
from common import Ranks, Tally, make_optimizers, optimizer_step, shard
from model import Forest, Model, ModelConfig, pack

SHAPES = {"7b": (28, 3584, 28, 4, 18944), "14b": (48, 5120, 40, 8, 13824), "32b": (64, 5120, 40, 8, 27648)}


class Live(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes, self.host, self.live, self.peak = {}, set(), 0, 0
        self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if function is torch.ops.aten._local_scalar_dense.default and types:
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 0.5)
        out = function(*args, **kwargs or {})
        if self.paused:
            return out
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == 'cpu':
                self.see(x.untyped_storage(), str(function))
        return out

    def see(self, storage, what=""):
        key = storage._cdata
        if key in self.host:
            return
        n = storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.gone, key)
        self.count(n - self.sizes.get(key, 0), what)
        self.sizes[key] = n

    def gone(self, key):
        self.count(-self.sizes.pop(key), "free")

    def count(self, n, what):
        self.live += n
        if self.live > self.peak:
            self.peak = self.live
            self.at = what

    def __enter__(self):
        resize, see = torch.UntypedStorage.resize_, self.see

        def resize_(storage, size):
            out = resize(storage, size)
            if storage._cdata in self.sizes: see(storage, "resize")
            return out
        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_)
        self.patch.start()
        from torch.distributed.tensor._sharding_prop import ShardingPropagator
        plain = ShardingPropagator._propagate_tensor_meta_non_cached
        def propagate(this, *a):
            self.paused = True
            try:
                return plain(this, *a)
            finally:
                self.paused = False
        self.patch2 = mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate)
        self.patch2.start()
        return super().__enter__()

    def __exit__(self, *args):
        self.patch.stop()
        self.patch2.stop()
        return super().__exit__(*args)


def config_of(size, layers=None):
    L, D, H, K, F = SHAPES[size]
    return ModelConfig.from_dict({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": layers or L, "hidden_size": D,
        "num_attention_heads": H, "num_key_value_heads": K, "intermediate_size": F, "vocab_size": 152064,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False})


def meta(config, dtype, ranks):
    with torch.device("meta"):
        model = Model(config).to(dtype)
    model.n_vocab, model.impl, model.gradient_checkpointing = 151665, "triton", True
    return shard(model, ranks, torch.bfloat16)


def main():
    size, world, layers, offload = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    ranks = Ranks(0, world, torch.device("cpu"))
    config = config_of(size, layers)
    policy, reference = meta(config, torch.float32, ranks), meta(config, torch.bfloat16, ranks).requires_grad_(False)
    forest = pack([([1] * 512, [[1] * 1682] * 7)])
    scored = torch.arange(512, 512 + 7 * 1682)
    M = len(scored)
    fakes, live = FakeTensorMode(allow_non_fake_inputs=True), Live()
    cfg = grpo.Config(model="x", data="x")
    began = time.time()
    def say(what):
        print(f"{what:30} live {live.live/1e9:8.3f} peak {live.peak/1e9:8.3f} host {sum(live.sizes[k] for k in live.host if k in live.sizes)/1e9:8.3f} {live.at} {time.time()-began:.0f}s", flush=True)
        live.peak = live.live
    fake_forest = Forest(*(fakes.from_tensor(x) for x in (forest.tokens_n, forest.positions_n, forest.previous_n)), forest.segments_s3)
    f = lambda x: fakes.from_tensor(x)
    micro = grpo.Micro(fake_forest, f(scored), f(torch.zeros(M)), f(torch.zeros(M)), 1.0)
    mini = grpo.MiniBatch([micro], M, 12288)
    numpy = torch.Tensor.numpy
    def real_numpy(x, *a, **k):
        with unset_fake_temporarily():
            return numpy(x, *a, **k)
    plain_host = common.host_memory
    def host_memory(x):
        live.paused = True
        out = plain_host(x)
        live.paused = False
        live.host.add(out.untyped_storage()._cdata)
        weakref.finalize(out.untyped_storage(), live.host.discard, out.untyped_storage()._cdata)
        return out
    with mock.patch.object(common, "host_memory", host_memory), no_kernels(), fakes, live, mock.patch.object(torch.Tensor, "numpy", real_numpy):
        policy.to_empty(device="cpu")
        say("policy")
        reference.to_empty(device="cpu")
        say("reference")
        grpo.score(reference, [mini], 1.0, ranks.device)
        say("score")
        tally = Tally()
        grpo.accumulate_gradients(cfg, ranks, policy, mini, tally, True)
        say("update 1")
        grpo.accumulate_gradients(cfg, ranks, policy, mini, tally, False)
        say("update 2")
        optimizers = make_optimizers(policy, "adamw", 1e-6, (0.9, 0.999), 0.01, offload)
        for o in optimizers:
            for g in o.param_groups: g["fused"] = True
        with mock.patch("torch._utils._get_fused_kernels_supported_devices" if hasattr(torch._utils, "_x") else "math.pi", 3.14):
            optimizer_step(policy, optimizers, 1e-6, 1.0, 0.5)
        say("step 1")
        grpo.accumulate_gradients(cfg, ranks, policy, mini, tally, False)
        say("update 3")
        optimizer_step(policy, optimizers, 1e-6, 1.0, 0.5)
        say("step 2")
    import os; os._exit(0)

if __name__ == "__main__":
    main()
