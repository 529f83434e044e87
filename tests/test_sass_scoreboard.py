"""The model of latency (benchmarks/sass_scoreboard.py) on small pieces of machine code, by hand."""

import pytest

from benchmarks import sass
from benchmarks.cards import CARDS
from benchmarks.sass_scoreboard import cycles, simulate

H100 = next(card for card in CARDS if card.name.startswith("H100"))
A100 = next(card for card in CARDS if card.name.startswith("A100"))
RTX4090 = next(card for card in CARDS if card.name.startswith("RTX 4090"))


def word(stall, result=7, operands_read=7, waits=()):
    """The upper half of an instruction's bits, among others that say nothing of time."""
    control = stall | 1 << 4 | result << 5 | operands_read << 8 | sum(1 << 11 + i for i in waits)
    return control << 41 | 0x800


def text(*lines):
    """As nvdisasm prints a kernel; of each line the label or the instruction and what `word` takes."""
    out = ["", '\t.section\t.text._Z6kernelv,"ax",@progbits', "\t.align\t128"]
    for number, (code, *control) in enumerate(lines):
        if code.endswith(":"):
            out.append(code)
            continue
        out.append(f"        /*{16 * number:04x}*/                   {code} ;      /* 0x0000000000027c12 */")
        out.append(f"{' ' * 60}/* 0x{word(*control):016x} */")
    return "\n".join(out)


def parsed(*lines):
    return sass.parse(text(*lines))["_Z6kernelv"]


def instructions(*lines):
    return parsed(*lines).instructions


CHAIN = instructions(*[(f"FFMA R{n}, R{n - 1}, R9, R9", 4) for n in (1, 2, 3)])
SPECIAL = instructions(("MUFU.EX2 R1, R0", 1, 0), ("FADD R0, R1, R1", 4, 7, 7, (0,)))


def test_instructions_are_read_with_their_bits():
    code = parsed(
        ("S2R R0, SR_TID.X", 2, 3),
        (".L_x_1:",),
        ("@!P0 LDS.64 R2, [R0+0x8]", 1, 0, 1),
        ("ULDC.64 UR4, c[0x0][0x210]", 1),
        ("FADD R4, R2, R3", 4, 7, 7, (0, 5)),
        (".L_x_2:",),
        ("@P1 BRA `(.L_x_2)", 5),
        ("@P0 BRA `(.L_x_1)", 5),
    )
    kinds = ["S2R", "LDS", "ULDC", "FADD", "BRA", "BRA"]
    assert [i.kind for i in code.instructions] == kinds and code.labels == {".L_x_1": 1, ".L_x_2": 4}
    load, add = code.instructions[1], code.instructions[3]
    assert load == sass.Instruction("LDS.64", " R2, [R0+0x8]", 1, 0, 1, ())
    assert (add.stall, add.result, add.operands_read, add.waits) == (4, sass.NO_SCOREBOARD, sass.NO_SCOREBOARD, (0, 5))
    assert [sass.count(loop) for loop in code.loops("LDS")] == [{"LDS": 1, "ULDC": 1, "FADD": 1, "BRA": 2}]


def test_only_innermost_loops_count():
    """Of those with the opcode that was asked for."""
    inner = [(".L_x_1:",), ("MUFU.EX2 R1, R0", 1, 0), ("@P0 BRA `(.L_x_1)", 5)]
    empty = [(".L_x_2:",), ("FADD R1, R1, R1", 4), ("@P0 BRA `(.L_x_2)", 5)]
    code = parsed((".L_x_0:",), ("NOP", 1), *inner, *empty, ("@P0 BRA `(.L_x_0)", 5))
    assert [sass.count(loop) for loop in code.loops()] == [{"MUFU": 1, "BRA": 1}, {"FADD": 1, "BRA": 1}]
    assert [sass.count(loop) for loop in code.loops("MUFU")] == [{"MUFU": 1, "BRA": 1}]
    assert [len(loop) for loop in code.loops("NOP")] == [6]


@pytest.mark.parametrize(
    "card, warps, took", [(H100, 4, 12), (H100, 8, 12), (H100, 16, 12), (H100, 32, 24), (A100, 16, 24)]
)
def test_a_chain_of_arithmetic(card, warps, took):
    """Three instructions of 4 cycles: a scheduler's 1, 2 and 4 warps take the same time; 8 have 24 instructions to
    issue, and an A100, whose float32 lanes take two cycles for a warp, needs 24 for 12."""
    found = simulate([CHAIN], warps, card)
    assert found.cycles == took and found.ipc == 3 * found.warps / took


@pytest.mark.parametrize("warps, took", [(4, 26), (8, 26), (16, 32), (32, 64)])
def test_special_functions_are_waited_for(warps, took):
    """22 cycles and 4 of the addition; 8 cycles of the unit for every warp."""
    assert simulate([SPECIAL], warps, H100).cycles == took


def test_a_first_round_cycle_by_cycle():
    """The first warp's function begins in cycle 0, the second's in 8, when the unit is free: its sum in 30."""
    assert cycles(SPECIAL, 1, H100, 1) == 26
    assert cycles(SPECIAL, 2, H100, 1) == 34


def test_loads_under_way_at_once():
    """500 cycles for a load, 4 more for a second at once, which the unit takes when it is free, and twice 500 for one
    after the other; 4 for a sum."""
    load, add = "LDG.E R1, desc[UR4][R2.64]", "FADD R3, R1, R3"
    one_by_one = instructions((load, 1, 0), (add, 4, 7, 7, (0,)), (load, 1, 0), (add, 4, 7, 7, (0,)))
    at_once = instructions((load, 1, 0), (load, 1, 1), (add, 4, 7, 7, (0, 1)))
    assert cycles(one_by_one, 1, H100, 1) == 1008 and cycles(at_once, 1, H100, 1) == 508


@pytest.mark.parametrize("load, took", [("LDG.E", 500), ("LDS", 30), ("LD.E", 30)])
def test_loads_by_memory(load, took):
    """A generic one's is shared."""
    loads = instructions((f"{load} R1, [R2]", 1, 0), ("FADD R3, R1, R3", 4, 7, 7, (0,)))
    assert cycles(loads, 1, H100, 1) == took + 4


def test_a_scoreboard_of_two_loads_is_released_by_the_later():
    loads = instructions(("LDG.E R1, [R2.64]", 1, 0), ("LDS R1, [R2]", 1, 0), ("FADD R3, R1, R3", 4, 7, 7, (0,)))
    assert cycles(loads, 1, H100, 1) == 504


def test_operands_must_have_been_read():
    """A store's address may change 10 cycles after the unit took it, not 30."""
    store = instructions(("STS [R0], R1", 1, 7, 2), ("IADD3 R0, R0, 0x4, RZ", 4, 7, 7, (2,)))
    assert cycles(store, 1, H100, 1) == 14


@pytest.mark.parametrize("card, interval", [(H100, 4), (A100, 8), (RTX4090, 32)])
def test_tensor_cores_by_card(card, interval):
    """1024 multiplications of each, over a scheduler's quarter of the card's rate."""
    products = instructions(*[("HMMA.1688.F32.TF32 R4, R8, R12, R4", 2)] * 2)
    assert simulate([products], 8, card).cycles == 4 * interval


def test_two_loops_are_added_up():
    both = simulate([CHAIN, SPECIAL], 4, H100)
    assert both.cycles == 12 + 26 and both.instructions == 5 and both.ipc == 5 / 38
