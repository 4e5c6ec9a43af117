"""A model split over the ranks that sample as one (--sampler-ranks): which part is whose, and where they must agree.

Each rank computes 1/n of the heads and of the MLP's columns. What they add to the residual is summed, twice a layer:
the model's mathematics is that of one rank, but for the order of the sums. Embedding, norms and head are whole on each.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

# The axis of a weight, or bias, that runs over heads or the MLP's columns; what is not here is whole on every rank
SPLIT_AXIS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}


@dataclass(frozen=True)
class Split:
    """This rank's place among the n of its group. For sampling only: no gradient passes through the sums."""
    rank: int = 0
    n: int = 1
    group: dist.ProcessGroup | None = None

    def config(self, whole, where="config.json"):
        """That of a part: fewer heads and columns. ValueError names what does not divide."""
        sizes = {name: getattr(whole, name) for name in ("num_key_value_heads", "num_attention_heads",
                                                         "intermediate_size")}
        for name, size in sizes.items():
            if size % self.n:
                raise ValueError(f"{where}: {name} is {size}, which --sampler-ranks {self.n} does not divide; "
                                 f"{math.gcd(8, *sizes.values())} is the largest that divides this model")
        return replace(whole, **{name: size // self.n for name, size in sizes.items()})

    def part(self, name, shape):
        """The slices of a whole tensor, by its name, that are this rank's."""
        slices = [slice(0, size) for size in shape]
        axis = SPLIT_AXIS.get(name.split(".")[-2])
        if axis is not None and axis < len(shape):  # o_proj's bias is whole: one rank adds it
            size = shape[axis] // self.n
            slices[axis] = slice(self.rank * size, (self.rank + 1) * size)
        return tuple(slices)

    def sum(self, x):
        """The sum of what the ranks computed."""
        if self.n > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def first(self, x):
        """x as the group's first rank has it."""
        if self.n > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def least(self, number, device):
        """The least of the ranks' numbers."""
        if self.n > 1:
            x = torch.tensor(number, dtype=torch.float64, device=device)
            dist.all_reduce(x, dist.ReduceOp.MIN, self.group)
            number = x.item()
        return number
