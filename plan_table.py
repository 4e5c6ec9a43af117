"""What --plan prints: the plan as a table, seconds a step by stated rates, and the options that would fit."""

from dataclasses import replace

from model import forward_flops
from options import rank_and_world
from pages import page_bytes
from plan import CONTEXT, NODE, config_in, make_plan, sizes_of
from split import Split


def report(folder, work, gpus, gpu_gb, rates):
    """What --plan prints; gpus and gpu_gb as in the options."""
    config, world, gpu_gb = config_in(folder), gpus or rank_and_world()[1], gpu_gb or 80.0
    plan = make_plan(config, work, world, gpu_gb)
    seconds = seconds_of(config, work, world, plan.n_kept, rates)
    lines = [f"{plan.line}; {CONTEXT / 1e9:.0f} GB of it for CUDA and NCCL", "", *table(plan, seconds), ""]
    if work.prompt_tokens:
        each = work.new_tokens + work.prompt_tokens / work.group_size
        lines.append(f"keys and values: {plan.n_kept:,} tokens, {int(plan.n_kept / each)} judgements of the longest "
                     f"length at once on {work.sampler_ranks} GPU{'s' * (work.sampler_ranks > 1)}")
    host = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in plan.host.items())
    lines.append(f"host memory of a node, GB: {sum(plan.host.values()) / 1e9:.0f}: {host}")
    choice = suggested(config, work, world, gpu_gb)
    if choice is None:
        lines.append("no --offload, --sampler-ranks or --micro-tokens makes it fit: take more GPUs")
    else:
        lines.append(f"the least that fits: --sampler-ranks {choice.sampler_ranks} --micro-tokens {choice.micro_tokens}"
                     + " --offload" * choice.offload)
    return "\n".join(lines)


def suggested(config, work, world, gpu_gb):
    """The first that fits: without --offload before with it, few --sampler-ranks before many; with those the largest
    --micro-tokens of 1, 2 and 4 times. None if nothing does."""
    for offload in (False, True):
        for n in (1, 2, 4, 8):
            if min(world, NODE) % n or config.num_key_value_heads % n or config.intermediate_size % n:
                continue
            choice = replace(work, offload=offload, sampler_ranks=n)
            if not make_plan(config, choice, world, gpu_gb).fits:
                continue
            for times in (4, 2):
                larger = replace(choice, micro_tokens=times * work.micro_tokens)
                if make_plan(config, larger, world, gpu_gb).fits:
                    return larger
            return choice
    return None


def table(plan, seconds):
    """Lines of Markdown: a row a part, a column a phase, GB of a rank."""
    names = dict.fromkeys(name for parts in plan.phases.values() for name, size in parts.items() if size)
    rows = [["GB", *plan.phases], ["---"] + ["--:"] * len(plan.phases)]
    rows += [[name] + [f"{parts[name] / 1e9:.1f}" if parts.get(name) else "" for parts in plan.phases.values()]
             for name in names]
    rows.append(["peak"] + [f"{plan.peak(phase) / 1e9:.1f}" for phase in plan.phases])
    rows.append(["seconds a step"] + [f"{seconds[phase]:.3g}" if phase in seconds else ""
                                      for phase in plan.phases])
    return ["| " + " | ".join(row) + " |" for row in rows]


def seconds_of(config, work, world, n_kept, rates):
    """{phase: seconds a step}, from rates that a card attains: TFLOP/s, memory TB/s, NVLink and host link GB/s one way.

    Prompts are taken to be a quarter of the longest, judgements (or chains) an eighth. Operations are forward_flops';
    forward and backward cost three times a forward pass, with checkpointing four times. Sharded weights arrive
    meanwhile: the longer of the two counts. A decode step reads the copy and the keys of what it writes on; with
    several sampler ranks it waits 10 us for each sum. AdamW moves 28 bytes a parameter; --offload 16 over the host
    link.
    """
    flops, memory, nvlink, host = (rate * unit for rate, unit in zip(rates, (1e12, 1e12, 1e9, 1e9)))
    sizes = sizes_of(config, world, work.sampler_ranks)
    writes = work.group_size > 1  # rollouts; an evaluation is no part of a step
    prompt, new = (work.prompt_tokens / 4, work.new_tokens / 8) if writes else (0, work.longest / 8)
    written, read = work.sequences * work.group_size * new, work.sequences * prompt
    packed = written + read
    forward_s = forward_flops(config, packed, written, packed * (prompt + new / 2)) / world / flops
    micros = packed / world / work.n + work.updates / 2  # the last one of an update is half full on average

    def passes(n_forward, bytes_moved):
        return max(n_forward * forward_s, (world > 1) * micros * bytes_moved * sizes.total / nvlink)
    seconds = {}
    if writes:
        groups, held = world / work.sampler_ranks, prompt / work.group_size + new / 2
        slots = max(1, min(work.n_slots, n_kept / held, written / groups / new))
        one = page_bytes(Split(0, work.sampler_ranks).config(config), 1, work.dtype)
        sums = (work.sampler_ranks > 1) * 2 * config.num_hidden_layers

        def step(n):
            computed = max((work.e * sizes.part + n * held * one) / memory, 2 * sizes.part * n / flops)
            return computed + sums * (1e-5 + n * config.hidden_size * work.e / nvlink)
        prefill = forward_flops(config, read, 0, read * prompt / 2) / world / flops
        seconds["rollout"] = prefill + max(written / groups / slots * step(slots), work.new_tokens * step(1))
    if work.reference:
        seconds["score"] = passes(1, work.e)
    seconds["update"] = passes(3 + work.checkpointing, 2 * work.e + 4)
    seconds["optimizer"] = work.updates * sizes.shard * (28 / memory + work.offload * 16 / host)
    return seconds
