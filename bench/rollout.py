"""Rollouts: our sampler against transformers' generate, n samples of each prompt at temperature 1.

    python -m bench.rollout --prompts 4 --samples 7 --prompt 512 --new 128

Every rollout is `new` tokens long (no stop token), so both write the same number; the unit is tokens written a second.
transformers is given equal prompts lengths, so that it needs no padding, and its default cache.
"""

import torch

from bench.twins import options, race, twins
from sample import Sampler, Sampling

if __name__ == "__main__":
    args = options(prompts=4, samples=7, prompt=512, new=128)
    model, peer = twins(args)
    device = model.head_vd.device
    ids = torch.randint(0, model.n_vocab, (args.prompts, args.prompt), generator=torch.Generator().manual_seed(0))
    sampler = Sampler(model, n_slots=args.prompts * args.samples)

    def ours():
        sampler.generate(ids.tolist(), Sampling(args.samples, args.new))

    def theirs():
        peer.generate(ids.to(device), attention_mask=torch.ones_like(ids).to(device), num_return_sequences=args.samples,
                      do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=args.new,
                      min_new_tokens=args.new, pad_token_id=0, eos_token_id=None)

    work = f"{args.prompts} prompts x {args.samples}, {args.prompt} + {args.new} tokens"
    race("rollout", args, work, args.prompts * args.samples * args.new, ours, theirs)
