"""The loops of a compiled kernel, read from its machine code: what one iteration executes, and what it waits for.

    loops(text)    text: what `cuobjdump -sass` or `nvdisasm -c` prints

A loop is a branch backwards. (Not those behind the kernel's EXIT: on sm_100 they return from spinning on a barrier.) Of
nested loops the innermost that multiplies counts: where a matrix kernel spends its time. What the kernels put under an
`if`, the masks, is part of a loop though most iterations jump over it: `skipped` counts it.
"""

import re
from collections import Counter
from dataclasses import dataclass

PRODUCTS = {"HMMA", "HGMMA", "UTCHMMA"}  # the tensor cores' instructions on sm_80, sm_90 and sm_100
# instruction -> class, the first pattern that fits; what fits none is "other"
CLASSES = (("HGMMA", "HGMMA"), ("UTCHMMA", "UTCHMMA"), ("HMMA", "HMMA"), ("MUFU", "MUFU"),
           ("F32", "FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|F2FP"), ("INT", "IMAD|IADD|LEA|LOP3|SHF|ISETP|SEL|VIADD|PRMT"),
           ("copy", "LDGSTS|UTMALDG"), ("shared", "LDS|LDSM"), ("store", "STS|STSM"), ("tensor memory", "LDTM|STTM"),
           ("spill", "LDL|STL"), ("barrier", "BAR|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE"), ("load", "LDG"))


def classify(opcode):
    """The class of an instruction: HGMMA.64x128x16.F32.BF16 is HGMMA's."""
    return next((name for name, pattern in CLASSES if re.match(pattern, opcode)), "other")


@dataclass(frozen=True)
class Loop:
    """One iteration, in order: (address, instruction, arguments)."""
    instructions: tuple

    @property
    def mix(self):
        """{class: how many}, and "all" of them."""
        mix = Counter(classify(opcode) for _, opcode, _ in self.instructions)
        return mix + Counter(all=len(self.instructions))

    @property
    def skipped(self):
        """The instructions that a branch inside the loop jumps over, and that do not multiply: the masked block's.
        (On sm_100 one thread multiplies for all: the others jump over that.)"""
        addresses, last = set(), self.instructions[-1][0]
        for address, opcode, arguments in self.instructions:
            target = branch_target(opcode, arguments)
            if target is not None and address < target <= last:
                over = [x for x in self.instructions if address < x[0] < target]
                if not any(classify(opcode) in PRODUCTS for _, opcode, _ in over):
                    addresses |= {x[0] for x in over}
        return len(addresses)

    @property
    def waits_for_own_copies(self):
        """Whether a copy to shared memory is waited for before any product has run since it was issued.

        Copies between two LDGDEPBAR are a group; DEPBAR.LE SB0, n waits until at most n groups are under way. Five
        times through the loop, so that what the iteration before has left under way is there.
        """
        groups, since, copied = [], 0, False  # groups: the number of products when each was closed
        for _ in range(5):
            exposed = False
            for _, opcode, arguments in self.instructions:
                word = opcode.split(".")[0]
                since += word in PRODUCTS
                copied = copied or word == "LDGSTS"
                if word == "LDGDEPBAR":
                    groups.append((since, copied))
                    copied = False
                elif word == "DEPBAR" and "SB0" in arguments:
                    n_left = int(re.search(r"SB0, (0x[0-9a-f]+)", arguments)[1], 16)
                    done, groups = groups[:max(0, len(groups) - n_left)], groups[max(0, len(groups) - n_left):]
                    exposed |= any(was_copy and when == since for when, was_copy in done)
        return exposed


def branch_target(opcode, arguments):
    """Where a branch goes: BRA `0x2740` or BRA.U UP0, `0x240`; None for every other instruction."""
    target = re.search(r"(0x[0-9a-f]+)$", arguments) if opcode.split(".")[0] == "BRA" else None
    return int(target[1], 16) if target else None


def instructions(text):
    """(address, instruction, arguments) of every instruction, in the order of the text."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", text)
    return [(int(address, 16), opcode, arguments.strip()) for address, opcode, arguments in lines]


def loops(text):
    """The innermost loops with products, in the order of the text."""
    lines, found = instructions(text), []
    for address, opcode, arguments in lines:
        target = branch_target(opcode, arguments)
        if target is not None and target < address:
            loop = Loop(tuple(x for x in lines if target <= x[0] <= address))
            if PRODUCTS & set(loop.mix) and not any(opcode == "EXIT" for _, opcode, _ in loop.instructions):
                found.append(loop)

    def inside(a, b):
        addresses = {address for address, _, _ in b.instructions}
        return a != b and addresses >= {address for address, _, _ in a.instructions}
    return [loop for loop in found if not any(inside(other, loop) for other in found)]
