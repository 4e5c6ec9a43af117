"""What only a GPU can answer, part by part: each prints a table with its goals beside it, in under three minutes.

    python -m bench.gpu --part decode            Qwen2.5-7B's geometry, random weights, bfloat16, one GPU of 80 GB
    python -m bench.gpu --part decode --toy      a tiny model, on a CPU too: that the command works

decode: a step of 32 to 256 rollouts, in groups of 7 on prompts of 2,048 tokens, each rollout 512 to about 1,000 tokens
long. They are not written but put there, as rollouts that had been put back: their keys come with the prefill (half a
million tokens, 8 PFLOP, in all). Then STEPS steps with CUDA graphs and STEPS without, after WARM_UP that compile and
capture: about 400 steps of 10 to 40 ms. Beside a step stands the time in which the card could read what the step has to
read, once: the weights and the keys and values. The bandwidth is that of a large copy on the same card. Last, where
they are installed, vLLM and transformers' continuous batching on the same prompts and rollouts, as prompts to be
continued: the time of PEER_STEPS + 1 tokens less the time of one.

The last line is JSON: {part: {...}}.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from batch import Batch, Rollout
from draw import Sampling
from model import Model, ModelConfig

QWEN_7B = dict(num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064)
TOY = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
           vocab_size=512)
GROUP = 7
WARM_UP, STEPS, PEER_STEPS = 4, 40, 64
GOALS = {"a step over its bandwidth bound, at most": 1.5, "tokens/s at 128 slots on an H100, at least": 10_000}


def geometry(fields):
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768, "tie_word_embeddings": False} | fields


def random_model(raw, device, dtype):
    """On the device from the start: on the host it would take minutes."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(raw)).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False)
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            x.zero_()
        elif x.ndim == 1:
            x.fill_(1)
        else:
            x.normal_(std=0.02)
    return model.fuse()


def bandwidth(device, n_bytes):
    """Bytes a second, read and written, of a large copy."""
    x = torch.zeros(n_bytes // 4, device=device)
    y, best = torch.empty_like(x), float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        y.copy_(x)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * x.element_size() / best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- decode


def make_rollouts(n_slots, n_prompt, shortest, longest, n_vocab):
    """Prompts, and for each the token ids of its rollouts, n_slots in all groups together."""
    rng = torch.Generator().manual_seed(n_slots)

    def ids(n):
        return torch.randint(0, n_vocab, (n,), generator=rng).tolist()
    prompts = [ids(n_prompt) for _ in range(-(-n_slots // GROUP))]
    lengths = torch.randint(shortest, longest + 1, (len(prompts), GROUP), generator=rng).tolist()
    return prompts, [[ids(n) for n in group] for group in lengths]


def writing(model, prompts, rollouts, n_slots, n_room):
    """A Batch whose slots are taken by these rollouts, with room for n_room tokens more."""
    longest = max(len(ids) for group in rollouts for ids in group)
    batch = Batch(model, prompts, Sampling(GROUP, longest + n_room), n_slots)
    for i, group in enumerate(rollouts):
        batch.groups[i] = [Rollout(list(ids), [0.0] * len(ids)) for ids in group]
        batch.n_left[i] = GROUP
    batch.admit()
    assert len(batch.slots) == n_slots, f"{len(batch.slots)} of {n_slots} rollouts fit into this device's memory"
    return batch


def bytes_read(batch):
    """By a step, once each: the weights but for the embedding, of which a row a slot is read; the keys and values."""
    model, config = batch.model, batch.model.config
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    embedding = model.model.embed_tokens.weight
    if not config.tie_word_embeddings:
        weights -= embedding.numel() * embedding.element_size()
    n_tokens = sum(len(batch.prompts[i]) for i in {slot.prompt for slot in batch.slots})
    n_tokens += sum(len(slot.rollout.ids) for slot in batch.slots)
    return weights + n_tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim \
        * embedding.element_size()


def ms_a_step(batch, n):
    for _ in range(WARM_UP):
        batch.step()
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        batch.step()  # reads what was drawn: the device is done
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def decode(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    raw = geometry(TOY if args.toy else QWEN_7B)
    n_prompt, shortest, longest = (20, 8, 12) if args.toy else (2048, 512, 1000)
    slots, steps = ((4, 9), 3) if args.toy else ((32, 64, 128, 256), STEPS)
    lengths = n_prompt, shortest, longest
    speed = bandwidth(device, 2**26 if args.toy else 2**31)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with torch.inference_mode():  # not the peers: a thread of transformers' is not in it
        rows = decode_ours(random_model(raw, device, dtype), slots, lengths, steps, speed, card)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    n_slots = slots[len(slots) // 2]
    peers = {name: peer_tokens_per_second(name, raw, n_slots, lengths) for name in args.peers}
    for name, result in peers.items():
        print(f"{name}, {n_slots} slots: {result if isinstance(result, str) else f'{result} tokens/s'}")
    print("goals: " + "; ".join(f"{goal} {number}" for goal, number in GOALS.items()))
    return {"device": card, "dtype": str(dtype)[6:], "bandwidth_gb_s": round(speed / 1e9), "steps": rows,
            "peers": peers}


def decode_ours(model, slots, lengths, steps, speed, card):
    n_parameters = sum(x.numel() for x in model.parameters())
    print(f"{card}, {speed / 1e9:.0f} GB/s; {n_parameters / 1e9:.2f}e9 parameters, {str(model.head_vd.dtype)[6:]}")
    print("slots  graphs   ms a step   bound   ratio   tokens/s")
    rows = []
    for n_slots in slots:
        prompts, rollouts = make_rollouts(n_slots, *lengths, model.n_vocab)
        batch = writing(model, prompts, rollouts, n_slots, 2 * (steps + WARM_UP) + 1)
        with_graphs = batch.graphs is not None
        for graphs in (True, False) if with_graphs else (False,):
            if not graphs:
                batch.graphs = None
            bound = 1e3 * bytes_read(batch) / speed
            ms = ms_a_step(batch, steps)
            rows.append({"slots": n_slots, "graphs": graphs, "ms": round(ms, 3), "bound_ms": round(bound, 3),
                         "ratio": round(ms / bound, 2), "tok_s": round(1e3 * n_slots / ms)})
            print(f"{n_slots:5}  {'yes' if graphs else 'no':6} {ms:11.2f} {bound:7.2f} {ms / bound:7.2f} "
                  f"{1e3 * n_slots / ms:10.0f}", flush=True)
        del batch  # its pages, before the next one's
    return rows


def peer_tokens_per_second(name, raw, n_slots, lengths):
    """Tokens a second, or why there are none."""
    prompts, rollouts = make_rollouts(n_slots, *lengths, raw["vocab_size"])
    requests = [ids + own for ids, group in zip(prompts, rollouts) for own in group][:n_slots]
    try:
        generate = PEERS[name](raw, max(map(len, requests)) + PEER_STEPS + 1)
        generate(requests, 1)
        seconds = []
        for n in (1, 1 + PEER_STEPS):
            began = time.perf_counter()
            generate(requests, n)
            seconds.append(time.perf_counter() - began)
        return round(n_slots * PEER_STEPS / (seconds[1] - seconds[0]))
    except ImportError as e:
        return f"not installed ({e})"
    except Exception as e:  # whatever another program does, what was measured before is to be printed
        return f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def vllm(raw, longest):
    from vllm import LLM, SamplingParams
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    llm = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=longest, max_num_seqs=256,
              enable_prefix_caching=True, gpu_memory_utilization=0.85)

    def generate(requests, n):
        params = SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
        out = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
        assert all(len(request.outputs[0].token_ids) == n for request in out)
    return generate


def transformers(raw, longest):
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    config = AutoConfig.for_model("qwen2", **fields)
    # on a CPU it would take nearly all memory, and fill it with zeros
    memory = None if device == "cuda" else ContinuousBatchingConfig(num_blocks=64)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")

    def generate(requests, n):
        how = GenerationConfig(max_new_tokens=n, do_sample=True, temperature=1.0, eos_token_id=-1, pad_token_id=0)
        out = model.eval().generate_batch(requests, how, memory)
        assert len(out) == len(requests) and all(len(x.generated_tokens) == n for x in out.values()), "not all came out"
    return generate


PEERS = {"vllm": vllm, "transformers": transformers}
PARTS = {"decode": decode}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU if there is no GPU")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU; --toy shows on a CPU that the command works")
    results = {}
    for part in args.part:
        began = time.perf_counter()
        results[part] = PARTS[part](args)
        print(f"{part}: {time.perf_counter() - began:.0f} s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
