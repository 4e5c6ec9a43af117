"""Rollouts: our sampler against transformers' generate, n samples of each prompt at temperature 1.

    python -m bench.rollout --model 25m                   every rollout `new` tokens long
    python -m bench.rollout --model 25m --uneven          lengths drawn from 16 to 2 x new: the same list for both
    python -m bench.rollout --model 25m --greedy-stream   one prompt, one rollout, the likeliest tokens

Both write the same number of tokens: random weights stop nowhere, so each rollout ends at its length (ours by
Batch.reason_to_end, transformers' by a StoppingCriteria that ends rows one by one: generate stops when all have ended).
The unit is tokens written a second, prompts included in the time. transformers runs as it is meant to: one batch, sdpa,
its default cache; --uneven-prompts, of half to the whole length, are padded on the left for it.
"""

import torch

import batch
from bench.twins import SHAPES, compare, geometry, options
from model import forward_flops
from sample import Sampler, Sampling

SHORTEST = 16


def make_prompts(args, n_vocab, rng):
    lengths = torch.full((args.prompts,), args.prompt)
    if args.uneven_prompts:
        lengths = torch.randint(args.prompt // 2, args.prompt + 1, (args.prompts,), generator=rng)
    return [torch.randint(0, n_vocab, (n,), generator=rng).tolist() for n in lengths.tolist()]


def make_lengths(args, rng):
    """[prompt][sample]: how many tokens each rollout has."""
    shape = args.prompts, args.samples
    if not args.uneven:
        return torch.full(shape, args.new)
    return torch.randint(SHORTEST, 2 * args.new + 1, shape, generator=rng)


class Ended:
    """A StoppingCriteria of transformers: which rows have written their lengths."""

    def __init__(self, n_before, length_b):
        self.n_before, self.length_b = n_before, length_b

    def __call__(self, ids_bn, scores_bv):
        return ids_bn.shape[1] - self.n_before >= self.length_b.to(ids_bn.device)


def main():
    args = options("uneven", "uneven-prompts", "greedy-stream", prompts=8, samples=7, prompt=512, new=128)
    if args.greedy_stream:
        args.prompts, args.samples, args.new = 1, 1, 2 * args.new
    config = geometry(*SHAPES[args.model])
    rng = torch.Generator().manual_seed(0)
    prompts, length_pg = make_prompts(args, config.vocab_size, rng), make_lengths(args, rng)
    lengths, longest = length_pg.tolist(), int(length_pg.max())
    temperature = 0.0 if args.greedy_stream else 1.0

    def ours(model):
        if model.model.layers[0].mlp.fused is None:
            model.fuse()  # as load_model leaves it
        batch.Batch.reason_to_end = lambda self, slot, _: (
            "length" if len(slot.rollout.ids) == lengths[slot.prompt][slot.sample] else None)
        sampling = Sampling(args.samples, longest, temperature=temperature)
        groups = Sampler(model, n_slots=args.prompts * args.samples).generate(prompts, sampling)
        assert [[len(rollout.ids) for rollout in group] for group in groups] == lengths

    def peer(model):
        from transformers import StoppingCriteriaList
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
        how = {"do_sample": False} if args.greedy_stream else {"do_sample": True, "temperature": 1.0, "top_p": 1.0,
                                                               "top_k": 0}
        out = model.generate(padded, attention_mask=mask, num_return_sequences=args.samples, max_new_tokens=longest,
                             pad_token_id=0, eos_token_id=None,
                             stopping_criteria=StoppingCriteriaList([Ended(width, length_pg.flatten())]), **how)
        assert out.shape == (args.prompts * args.samples, width + longest)

    kind = "greedy, " if args.greedy_stream else ""
    length = f"{SHORTEST} to {2 * args.new}" if args.uneven else args.new
    work = f"{kind}{args.prompts} prompts x {args.samples}, {args.prompt} + {length} tokens"
    n_drawn = int(length_pg.sum())
    # the last token of a rollout is never an input, and the first comes from the prompt's states
    n_computed = sum(map(len, prompts)) + n_drawn - length_pg.numel()
    compare("rollout", args, work, n_drawn, ours, peer, forward_flops(config, n_computed, n_drawn))


if __name__ == "__main__":
    main()
