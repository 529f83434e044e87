"""NVIDIA's machine code as ``nvdisasm -c -hex`` prints it: instructions, what their bits say of time, loops.

The bits (Volta and later: Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, section
2) are the compiler's own schedule: after how many cycles a warp may go on, and for which scoreboards it must wait.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from dataclasses import dataclass

NO_SCOREBOARD = 7

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_WORD = r"/\*\s*0x([0-9a-f]{16})\s*\*/"
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s*(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?)\s*;?\s*" + _WORD)
_SECOND_WORD = re.compile(r"\s*" + _WORD)


@dataclass(frozen=True)
class Instruction:
    """``stall``: cycles until the warp's next instruction. ``result`` and ``operands_read``: the scoreboards that are
    released when the result is there and when the operands have been read, or NO_SCOREBOARD; ``waits``: those that must
    have been released before."""

    opcode: str  # with its modifiers
    operands: str
    stall: int
    result: int = NO_SCOREBOARD
    operands_read: int = NO_SCOREBOARD
    waits: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]


def decode(opcode: str, operands: str, upper_word: int) -> Instruction:
    """Of an instruction's 128 bits the upper 64."""
    control = upper_word >> 41
    waits = tuple(i for i in range(6) if control >> 11 + i & 1)
    return Instruction(opcode, operands, control & 15, control >> 5 & 7, control >> 8 & 7, waits)


@dataclass
class Code:
    """A kernel's instructions, and the number of the one behind each label."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self, kind: str = "") -> list[list[Instruction]]:
        """Those with opcodes that begin with ``kind``, and no other such loop within, in order of their ends."""
        spans = []
        for end, instruction in enumerate(self.instructions):
            jump = re.search(r"\.L_x_\d+", instruction.operands) if instruction.kind == "BRA" else None
            begin = self.labels.get(jump[0], end) if jump else end
            if begin < end and any(i.opcode.startswith(kind) for i in self.instructions[begin : end + 1]):
                spans.append((begin, end))
        inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        return [self.instructions[begin : end + 1] for begin, end in inner]


def parse(text: str) -> dict[str, Code]:
    """Kernels of a disassembly by their mangled names."""
    kernels = {}
    for part in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        code = kernels[re.split(r"[\s,]", part, maxsplit=1)[0]] = Code([], {})
        found: re.Match | None = None
        for line in part.splitlines():
            if label := _LABEL.match(line):
                code.labels[label[1]] = len(code.instructions)
            elif first := _INSTRUCTION.match(line):
                found = first
            elif found and (second := _SECOND_WORD.match(line)):
                code.instructions.append(decode(found[1], found[2], int(second[1], 16)))
                found = None
    return kernels


def count(instructions: Sequence[Instruction]) -> collections.Counter:
    """Opcodes without modifiers, but those that do nothing."""
    return collections.Counter(i.kind for i in instructions if i.kind != "NOP")
