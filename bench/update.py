"""The GRPO update's forward and backward pass: our forest against transformers on one row per response.

    python -m bench.update --groups 2 --samples 7 --prompt 512 --new 128

Ours runs each prompt once and scores responses through linear_logp. The peer runs [prompt + response] rows in one batch
and takes log_softmax of the logits of the response positions (`logits_to_keep`). Same weights, same tokens; the loss is
the mean log-probability, and both must find the same one. The unit is response tokens a second.
"""

import torch

from bench.twins import SHAPES, compare, options
from model import pack


def main():
    args = options(groups=2, samples=7, prompt=512, new=128)
    n_vocab, rng = SHAPES[args.model][-1], torch.Generator().manual_seed(0)
    prompts = torch.randint(0, n_vocab, (args.groups, args.prompt), generator=rng)
    replies = torch.randint(0, n_vocab, (args.groups, args.samples, args.new), generator=rng)
    losses = {}

    def ours(model):
        device = model.head_vd.device
        forest = pack(list(zip(prompts.tolist(), replies.tolist())), device)
        scored_m = torch.cat([torch.arange(s, s + n) for s, n, parent in forest.segments_s3.tolist() if parent >= 0])
        logp_m, _ = model(forest, scored_m.to(device))
        losses["ours"] = logp_m.mean()
        losses["ours"].backward()
        model.zero_grad()

    def peer(model):
        rows = torch.cat([prompts.repeat_interleave(args.samples, 0), replies.flatten(0, 1)], 1).to(model.device)
        logits = model(rows, logits_to_keep=args.new + 1, use_cache=False).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, rows[:, -args.new:, None])
        losses["peer"] = logp.mean()
        losses["peer"].backward()
        model.zero_grad()

    work = f"{args.groups} groups x {args.samples}, {args.prompt} + {args.new} tokens"
    compare("update", args, work, args.groups * args.samples * args.new, ours, peer)
    if not args.side:
        assert abs(losses["ours"] - losses["peer"]) < (1e-5 if args.dtype == "float32" else 1e-2), losses


if __name__ == "__main__":
    main()
