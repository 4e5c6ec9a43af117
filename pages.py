"""The sampler's memory: keys and values in pages, whose they are, and what a decode step is told of it.

A page holds I tokens' keys and values of all layers. A rollout takes a page whenever its last one is full, and gives
all back when it ends; a prompt's pages serve all its rollouts. So memory is taken as it is needed, nothing is ever
copied to grow, and what one long judgement takes, others need not have.
"""

import os

import numpy as np
import torch

from kernels import NOBODY, Tables

BIN = 0  # the page where an empty slot writes, and whatever else nobody will read


class Pool:
    """Keys (rotated) and values, per layer [X, K, I, C], and which of the X pages are free."""

    def __init__(self, config, n_pages, page_size, device, dtype):
        shape = n_pages, config.num_key_value_heads, page_size, config.head_dim
        # zeros: the PyTorch path multiplies what nobody owns by zero. On a CPU they take memory when they are written
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.page_size, self.n_tokens = page_size, n_pages * page_size
        self.gb = n_pages * page_bytes(config, page_size, dtype) / 1e9
        self.free_x = np.ones(n_pages, dtype=bool)
        self.free_x[BIN] = False
        self.n_free = n_pages - 1

    def needed(self, n_tokens):
        return -(-n_tokens // self.page_size)

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


def page_bytes(config, page_size, dtype):
    """Of keys and values, in all layers."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return page_size * per_token


def free_bytes(device):
    """What the cache may take where no --kv-gb says so: four fifths of a GPU's free memory, half of a computer's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.8 * (torch.cuda.mem_get_info(device)[0] + cached)
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class StepInputs:
    """All that a decode step reads besides the weights and the pool, in memory that does not move: a CUDA graph replays
    with its addresses. Written on the host; `upload` brings over what has changed. On a CPU both are one.

    The columns of a slot: its last token, which is the step's input; that token's position, and where its keys go
    (page, offset); how many tokens the slot has, this one included; its place (see Tables); and what its random numbers
    come from. Example: a prompt of 10 tokens (positions 0 to 9) and 3 drawn ones: the third is at position 12, its keys
    go to offset 2 of the slot's first page, and it sees 10 + 3 keys.
    """
    COLUMNS = "token", "position", "length", "key", "sample", "page", "offset", "place"

    def __init__(self, n_slots, n_own, n_prompt, n_members, n_pages, device):
        """n_own pages at most for a slot's own tokens, n_prompt for a prompt, which n_members slots continue."""
        shapes = {"slot_rb": (len(self.COLUMNS), n_slots), "length_p": (n_slots,), "slot_pg": (n_slots, n_members),
                  "owner_x": (n_pages,), "first_x": (n_pages,)}
        arrays = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        arrays["page_bt"] = torch.zeros(n_slots, n_own, dtype=torch.int32)
        arrays["page_pu"] = torch.zeros(n_slots, n_prompt, dtype=torch.int32)
        if device.type == "cuda":
            arrays = {name: x.pin_memory() for name, x in arrays.items()}
        self.pinned = arrays
        self.host = {name: x.numpy() for name, x in arrays.items()}
        self.device = {name: x.to(device) for name, x in arrays.items()}
        self.column = dict(zip(self.COLUMNS, self.host["slot_rb"]))
        self.changed = set()

    def fill(self, slots, prompts, prompt_lengths, page_size):
        """Slots (in order) and the prompts that they continue: {prompt: its pages}, {prompt: its tokens}."""
        host, column = self.host, self.column
        host["slot_rb"][:] = 0
        column["length"][:] = 1  # an empty slot sees the bin's first token, and nobody reads what comes of it
        column["place"][:] = -1
        host["slot_pg"][:] = -1
        host["length_p"][:] = 0
        host["page_bt"][:] = -1
        host["page_bt"][:, 0] = BIN
        host["page_pu"][:] = -1
        host["owner_x"][:] = 0
        host["first_x"][:] = NOBODY
        n_members = host["slot_pg"].shape[1]
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(slot.prompt for slot in slots))}
        for prompt, row in row_of.items():
            host["length_p"][row] = prompt_lengths[prompt]
            for u, page in enumerate(prompts[prompt]):
                self._give(page, -1 - row, "page_pu", row, u, page_size)
        for b, slot in enumerate(slots):
            row = row_of[slot.prompt]
            host["slot_pg"][row, slot.sample] = b
            column["place"][b] = row * n_members + slot.sample
            column["token"][b] = slot.rollout.ids[-1]
            column["length"][b] = len(slot.rollout.ids)
            column["position"][b] = prompt_lengths[slot.prompt] + len(slot.rollout.ids) - 1
            column["key"][b] = slot.key
            column["sample"][b] = slot.sample
            for t, page in enumerate(slot.pages):
                self._give(page, b, "page_bt", b, t, page_size)
        self.n_slots, self.n_rows = len(slots), len(row_of)
        self.n_own = 1 + max(max(slot.pages) for slot in slots)
        self.n_shared = len(host["owner_x"]) - min(min(prompts[prompt]) for prompt in row_of)
        self.n_own_pages = max(len(slot.pages) for slot in slots)
        self.n_prompt_pages = max(len(prompts[prompt]) for prompt in row_of)
        self.changed = set(host)

    def _give(self, page, owner, table, row, number, page_size):
        self.host[table][row, number] = page
        self.host["owner_x"][page] = owner
        self.host["first_x"][page] = number * page_size

    def grow(self, b, slot, page_size):
        """Slot b has taken another page, the last of its list."""
        self._give(slot.pages[-1], b, "page_bt", b, len(slot.pages) - 1, page_size)
        self.n_own = max(self.n_own, slot.pages[-1] + 1)
        self.n_own_pages = max(self.n_own_pages, len(slot.pages))
        self.changed |= {"page_bt", "owner_x", "first_x"}

    def advance(self, tokens):
        """Each slot has drawn one more token."""
        n = len(tokens)
        self.column["token"][:n] = tokens
        self.column["position"][:n] += 1
        self.column["length"][:n] += 1

    def upload(self, page_size):
        """Before a step: where its keys go, and what has changed since the last one."""
        last_b = self.column["length"] - 1
        self.column["page"][:] = self.host["page_bt"][np.arange(len(last_b)), last_b // page_size]
        self.column["offset"][:] = last_b % page_size
        for name in self.changed | {"slot_rb"}:
            if self.device[name] is not self.pinned[name]:
                self.device[name].copy_(self.pinned[name], non_blocking=True)
        self.changed = set()

    def tables(self, n, page_size, whole):
        """(columns [8, n], Tables) of the first n slots. whole: with all the tables' memory, of the same shapes always;
        else with what is in use."""
        x = self.device
        slot_rb = x["slot_rb"][:, :n]
        length_b, place_b = (slot_rb[self.COLUMNS.index(name)] for name in ("length", "place"))
        rows, own, prompt = n, x["page_bt"].shape[1], x["page_pu"].shape[1]
        if not whole:
            rows, own, prompt = self.n_rows, self.n_own_pages, self.n_prompt_pages
        return slot_rb, Tables(x["page_bt"][:n, :own], length_b, x["page_pu"][:rows, :prompt], x["length_p"][:rows],
                               x["slot_pg"][:rows], place_b, x["owner_x"], x["first_x"], self.n_own, self.n_shared,
                               page_size)
