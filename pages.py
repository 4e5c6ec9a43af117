"""The sampler's memory: keys and values in pages, whose they are, and what a decode step is told of it.

A page holds I tokens' keys and values of all layers. A rollout takes a page whenever its last one is full, and gives
all back when it ends; a prompt's pages serve all its rollouts. So memory is taken as it is needed, nothing is ever
copied to grow, and what one long judgement takes, others need not have.
"""

import math
import os

import numpy as np
import torch

from kernels import NOBODY, Tables

PAGE_SIZE = 64  # tokens
BIN = 0  # the page where an empty slot writes, and whatever else nobody will read


class Pool:
    """Keys (rotated) and values, per layer [X, K, I, C], and which of the X pages are free."""

    def __init__(self, config, n_pages, page_size, device, dtype):
        shape = n_pages, config.num_key_value_heads, page_size, config.head_dim
        self.k = [_zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self.v = [_zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self.page_size, self.n_tokens = page_size, n_pages * page_size
        self.gb = n_pages * page_bytes(config, page_size, dtype) / 1e9
        self.free_x = np.ones(n_pages, dtype=bool)
        self.free_x[BIN] = False
        self.n_free = n_pages - 1

    def needed(self, n_tokens):
        return pages_for(n_tokens, self.page_size)

    def take(self, n, shared=False):
        """n free pages: the first ones for a slot, the last ones for a prompt, so that each kind lies together."""
        free = np.flatnonzero(self.free_x)
        pages = (free[::-1] if shared else free)[:n].tolist()
        assert len(pages) == n, f"{n} pages wanted, {len(free)} are free"
        self.free_x[pages] = False
        self.n_free -= n
        return pages

    def give_back(self, pages):
        self.free_x[pages] = True
        self.n_free += len(pages)

    def gather(self, lists, shared=False):
        """Moves the pages that these lists name to the beginning, or to the end, of the pool; the lists are changed.

        For the PyTorch path, which walks all pages up to the last one in use, when most of them have become free.
        """
        old = sorted((page for pages in lists for page in pages), reverse=shared)
        self.give_back(old)
        new = self.take(len(old), shared)
        for memory in self.k + self.v:
            memory[new] = memory[old]  # the right side is a copy: pages may take the places of others that move
        new_of = dict(zip(old, new))
        for pages in lists:
            pages[:] = [new_of[page] for page in pages]


def _zeros(shape, device, dtype):
    """Zeros, because the PyTorch path multiplies what nobody owns by zero. On a CPU they are numpy's, which take no
    memory until something is written."""
    if device.type == "cuda":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def pages_for(n_tokens, page_size):
    return -(-n_tokens // page_size)


def page_bytes(config, page_size, dtype):
    """Of keys and values, in all layers."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return page_size * per_token


def affordable(config, split, dtype, device, kv_gb, longest_prompt, max_new_tokens, page_size, work_bytes=0):
    """The number of pages that the bound allows: kv_gb, or what is free now, on the rank that has least, less what a
    step needs to work. ValueError if one rollout may need more. config: of the part that each rank computes."""
    least = 1 + pages_for(longest_prompt, page_size) + pages_for(max_new_tokens, page_size)  # 1: the bin
    one = page_bytes(config, page_size, dtype)
    allowed = 1e9 * kv_gb if kv_gb else split.least(free_bytes(device), device) - work_bytes
    if allowed < least * one:
        bound = f"--kv-gb {kv_gb:g}" if kv_gb else f"the {allowed / 1e9:.3g} GB that are free for keys and values"
        raise ValueError(f"{bound}: one rollout of {max_new_tokens} tokens after the longest prompt, {longest_prompt}, "
                         f"needs {math.ceil(least * one / 1e6) / 1e3:.3f} GB")
    return int(allowed / one)


def free_bytes(device):
    """Nine tenths of a GPU's free memory, half of a computer's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class StepInputs:
    """All that a decode step reads besides the weights and the pool, in memory that does not move: a CUDA graph replays
    with its addresses. Written on the host; `upload` brings over what has changed. On a CPU both are one.

    The columns of a slot: its last token, which is the step's input; that token's position, and where its keys go
    (page, offset); how many tokens the slot has, this one included; its prompt's row in the tables and its place there,
    by arrival; and what its random numbers come from. Example: a prompt of 10 tokens (positions 0 to 9) and 3 drawn
    ones: the third is at position 12, its keys go to offset 2 of the slot's first page, and it sees 10 + 3 keys.
    """
    COLUMNS = "token", "position", "length", "key", "sample", "page", "offset", "row", "member"

    def __init__(self, n_slots, own_pages, prompt_pages, n_members, n_pages, page_size, device):
        """own_pages at most for a slot's own tokens, prompt_pages for a prompt, which n_members slots continue."""
        shapes = {"slot_rb": (len(self.COLUMNS), n_slots), "length_p": (n_slots,), "slot_pg": (n_slots, n_members),
                  "owner_x": (n_pages,), "first_x": (n_pages,)}
        arrays = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        arrays["page_bt"] = torch.zeros(n_slots, own_pages, dtype=torch.int32)
        arrays["page_pu"] = torch.zeros(n_slots, prompt_pages, dtype=torch.int32)
        if device.type == "cuda":
            arrays = {name: x.pin_memory() for name, x in arrays.items()}
        self.page_size = page_size
        self.pinned = arrays
        self.host = {name: x.numpy() for name, x in arrays.items()}
        self.device = {name: x.to(device) for name, x in arrays.items()}
        self.column = dict(zip(self.COLUMNS, self.host["slot_rb"]))
        self.changed = set()

    def fill(self, slots, pages_of, prompt_lengths):
        """Slots, in order, and the prompts that they continue: {prompt: its pages}, {prompt: its tokens}."""
        host, column, n = self.host, self.column, len(slots)
        host["slot_rb"][:] = 0
        column["length"][:] = 1  # an empty slot sees the bin's first token, and nobody reads what comes of it
        column["row"][:] = -1
        host["slot_pg"][:] = -1
        host["length_p"][:] = 0
        host["page_bt"][:] = -1
        host["page_bt"][:, 0] = BIN
        host["page_pu"][:] = -1
        host["owner_x"][:] = 0
        host["first_x"][:] = NOBODY
        prompts = list(dict.fromkeys(slot.prompt for slot in slots))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        rows = [row_of[slot.prompt] for slot in slots]
        drawn = np.array([len(slot.rollout.ids) for slot in slots])
        column["token"][:n] = [slot.rollout.ids[-1] for slot in slots]
        column["length"][:n] = drawn
        column["position"][:n] = drawn - 1 + [prompt_lengths[slot.prompt] for slot in slots]
        column["key"][:n] = [slot.key for slot in slots]
        column["sample"][:n] = [slot.sample for slot in slots]
        column["row"][:n] = rows
        n_members = [0] * len(prompts)
        for b, row in enumerate(rows):
            column["member"][b] = n_members[row]
            host["slot_pg"][row, n_members[row]] = b
            n_members[row] += 1
        host["length_p"][:len(prompts)] = [prompt_lengths[prompt] for prompt in prompts]
        own, shared = [slot.pages for slot in slots], [pages_of[prompt] for prompt in prompts]
        self._give("page_bt", own, np.arange(n))
        self._give("page_pu", shared, -1 - np.arange(len(prompts)))
        # how much of the tables is in use
        self.n_rows, self.n_members = len(prompts), max(n_members)
        self.own_pages, self.prompt_pages = max(map(len, own)), max(map(len, shared))
        self.n_own = 1 + max(map(max, own))
        self.n_shared = len(host["owner_x"]) - min(map(min, shared))
        self.changed = set(host)

    def _give(self, table, lists, owners):
        """Enters the pages of these lists, row by row."""
        n = np.array([len(pages) for pages in lists])
        page = np.concatenate(lists)
        row = np.arange(len(lists)).repeat(n)
        number = np.arange(len(page)) - (n.cumsum() - n).repeat(n)
        self.host[table][row, number] = page
        self.host["owner_x"][page] = owners.repeat(n)
        self.host["first_x"][page] = number * self.page_size

    def grow(self, b, pages):
        """Slot b has taken another page, the last of its list."""
        last = len(pages) - 1
        self.host["page_bt"][b, last] = pages[-1]
        self.host["owner_x"][pages[-1]] = b
        self.host["first_x"][pages[-1]] = last * self.page_size
        self.n_own = max(self.n_own, pages[-1] + 1)
        self.own_pages = max(self.own_pages, len(pages))
        self.changed |= {"page_bt", "owner_x", "first_x"}

    def advance(self, tokens):
        """Each slot has drawn one more token."""
        n = len(tokens)
        self.column["token"][:n] = tokens
        self.column["position"][:n] += 1
        self.column["length"][:n] += 1

    def upload(self):
        """Before a step: where its keys go, and what has changed since the last one."""
        last_b = self.column["length"] - 1
        self.column["page"][:] = self.host["page_bt"][np.arange(len(last_b)), last_b // self.page_size]
        self.column["offset"][:] = last_b % self.page_size
        for name in self.changed | {"slot_rb"}:
            if self.device[name] is not self.pinned[name]:
                self.device[name].copy_(self.pinned[name], non_blocking=True)
        self.changed = set()

    def tables(self, n, whole):
        """{name: its column of the first n slots} and their Tables. whole: with all the tables' memory, of the same
        shapes always; else with what is in use."""
        x = self.device
        column = dict(zip(self.COLUMNS, x["slot_rb"][:, :n]))
        rows, own, prompt, members = n, x["page_bt"].shape[1], x["page_pu"].shape[1], x["slot_pg"].shape[1]
        if not whole:
            rows, own, prompt, members = self.n_rows, self.own_pages, self.prompt_pages, self.n_members
        place_b = (column["row"] * members + column["member"]).clamp(min=-1)
        return column, Tables(x["page_bt"][:n, :own], column["length"], x["page_pu"][:rows, :prompt],
                              x["length_p"][:rows], x["slot_pg"][:rows, :members], place_b, x["owner_x"], x["first_x"],
                              self.n_own, self.n_shared, self.page_size)
