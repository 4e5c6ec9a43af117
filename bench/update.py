"""The GRPO update's forward and backward pass: our forest against transformers on one row per response.

    python -m bench.update --groups 2 --samples 7 --prompt 512 --new 128

Ours runs each prompt once and scores responses through linear_logp. The peer runs [prompt + response] rows in one batch
and takes log_softmax of the logits of the response positions (`logits_to_keep`). Same weights, same tokens; the loss is
the mean log-probability, and both must find the same one. The unit is response tokens a second.
"""

import torch

from bench.twins import options, race, twins
from model import pack

if __name__ == "__main__":
    args = options(groups=2, samples=7, prompt=512, new=128)
    model, peer = twins(args)
    device, rng = model.head_vd.device, torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.n_vocab, (args.groups, args.prompt), generator=rng)
    replies = torch.randint(0, model.n_vocab, (args.groups, args.samples, args.new), generator=rng)
    losses = {}

    def ours():
        forest = pack(list(zip(prompts.tolist(), replies.tolist())), device)
        scored_m = torch.cat([torch.arange(s, s + n) for s, n, parent in forest.segments_s3.tolist() if parent >= 0])
        logp_m, _ = model(forest, scored_m.to(device))
        losses["ours"] = logp_m.mean()
        losses["ours"].backward()
        model.zero_grad()

    def theirs():
        rows = torch.cat([prompts.repeat_interleave(args.samples, 0), replies.flatten(0, 1)], 1).to(device)
        logits = peer(rows, logits_to_keep=args.new + 1, use_cache=False).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, rows[:, -args.new:, None])
        losses["theirs"] = logp.mean()
        losses["theirs"].backward()
        peer.zero_grad()

    work = f"{args.groups} groups x {args.samples}, {args.prompt} + {args.new} tokens"
    race("update", args, work, args.groups * args.samples * args.new, ours, theirs)
    assert abs(losses["ours"] - losses["theirs"]) < (1e-5 if args.dtype == "float32" else 1e-2), losses
