"""What can be said of the CUDA kernels without a GPU, from nvcc's machine code; gpu_static.py has it beside Triton's.

python -m benchmarks.cuda_static [--targets sm_80 sm_90]
"""

from __future__ import annotations

import argparse
import collections
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from . import sass, sass_scoreboard, triton_static
from .cards import Card

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
# A kernel without what lies beside it, for which those that are no templates become some.
ALONE = """
#include "{folder}/core/device.cuh"
#undef HK_KERNEL
#define HK_KERNEL template <class...> __global__
#include "{folder}/pixel_losses/segmentation.cuh"
#include "{folder}/projected_losses/projected_losses_weights.cuh"
#include "{folder}/projection/projection_back.cuh"
#include "{folder}/projection/projection_weights.cuh"
using namespace hetero::cuda;
void* kernel = reinterpret_cast<void*>({kernel});
"""
# As CMakeLists.txt: what a host's function gives a kernel is undefined, of which nvcc only warns. The first leaves out
# constexpr functions, which have numbers of their own.
STRICT = ("-Werror=cross-execution-space-call", "-diag-error=20013,20015")
CLASSES_PER_THREAD = 20  # kClassesPerThread of pixel_losses/tiles.h: how often a row's loop over classes is unrolled
THREADS = 128
# Kernels of the default calls by their template arguments, and the launch of triton_static.paper_launches they are.
SHIPPED = {
    "hakd_kernel<1,2,0,1>": ("hakd_loss, label resolution", "K <= 20"),
    "hakd_kernel<1,2,1,1>": ("hakd_loss, label resolution, with L_proj", "K <= 20"),
    "hakd_kernel<1,2,0,0>": ("hakd_loss, label resolution", "more"),
    "segmentation_kernel<1,1,0,1>": ("segmentation_loss, CE + KD", "K <= 20"),
    "segmentation_kernel<0,1,0,1>": ("segmentation_loss, CE", "K <= 20"),
    "segmentation_kernel<1,1,0,0>": ("segmentation_loss, CE + KD", "more"),
}


# Kernels on features, of 256 threads: tiles of 16 pixels, of 8 classes; weights' gradient from the chip, weights there.
PROJECTED = {
    "projected_hakd_kernel<2,4,1,1>": "K <= 32, 768 channels, 32 pixels",
    "projected_hakd_kernel<1,4,1,0>": "K <= 32, 768 channels, 16 pixels",
    "projected_hakd_kernel<2,4,0,0>": "K <= 32, more channels",
    "projected_hakd_kernel<2,12,0,0>": "K <= 96",
    "projected_hakd_kernel<1,24,0,0>": "K <= 192",
    "weight_gradients_kernel<6,4,32>": "K <= 32, second read",
    "weight_gradients_kernel<2,12,32>": "K <= 96, second read",
    "weight_gradients_kernel<1,24,16>": "K <= 192, second read",
    "project_kernel<2,4>": "raw logits, K <= 32",
    "project_kernel<2,12>": "raw logits, K <= 96",
    "project_kernel<2,20>": "raw logits, K <= 160",
    "project_kernel<1,24>": "raw logits, 192 classes at a time",
    "projection_weights_kernel<6,4,32>": "their second read, K <= 32",
    "projection_weights_kernel<2,12,32>": "their second read, K <= 96",
    "projection_weights_kernel<2,20,16>": "their second read, K <= 160",
    "projection_weights_kernel<1,24,16>": "their second read, 192 classes at a time",
    "project_back_kernel": "any K",
}


@dataclass
class Kernel:
    """A compiled kernel; ``row``: the loop over rows of pixels, of the unguarded mathematics; ``code``: all opcodes;
    ``wide_loads``: those that read 16 bytes of global memory; ``product_loops``: those around tensor core
    instructions; ``staging``: opcodes of those around stores of 16 bytes to shared memory."""

    name: str
    registers: int
    stack_bytes: int
    row: list[sass.Instruction]
    code: collections.Counter
    wide_loads: int = 0
    product_loops: list[list[sass.Instruction]] = field(default_factory=list)
    staging: collections.Counter = field(default_factory=collections.Counter)

    @property
    def loop(self) -> collections.Counter:
        """Opcodes of a row of pixels."""
        return sass.count(self.row)

    @property
    def products(self) -> collections.Counter:
        """Opcodes of the loops around tensor core instructions, together."""
        return sum(map(sass.count, self.product_loops), collections.Counter())

    @property
    def instructions(self) -> float:
        """Of each (pixel, class) of a thread with all the classes it can have."""
        return sum(self.loop.values()) / CLASSES_PER_THREAD

    @property
    def special_functions(self) -> float:
        return self.loop["MUFU"] / CLASSES_PER_THREAD

    @property
    def instructions_of_a_product(self) -> float:
        """That there are for each tensor core instruction in the loops around them."""
        return sum(self.products.values()) / self.products["HMMA"]

    @property
    def instructions_of_a_fragment(self) -> float:
        """That there are for each fragment that a warp lays out in shared memory."""
        return sum(self.staging.values()) / self.staging["STS"]

    def round(self, card: Card, warps: int) -> sass_scoreboard.Round:
        """Through the loops around tensor core instructions, or a row of pixels; ``warps`` of a multiprocessor."""
        return sass_scoreboard.simulate(self.product_loops or [self.row], warps, card)

    def warps(self, target: str, threads: int = THREADS) -> int:
        """That fit a multiprocessor's registers, which a block takes in units of 8 for each thread."""
        blocks = 65536 // (threads * (-(-self.registers // 8) * 8))
        most = 64 if target in ("sm_80", "sm_90", "sm_100") else 48
        return min(blocks * threads // 32, most)


def nvcc() -> str | None:
    return shutil.which("nvcc")


def _readable(mangled: str) -> str:
    """``hakd_kernel<1,2,0,1>`` of a mangled name, whose arguments may be those of one type."""
    name = re.search(r"(?<=\d)([a-z_]+_kernel)(?:I(?:NS\d*_\d+[A-Za-z]+?I)?((?:L[bi]\d+E)+)E)?", mangled)
    if name is None:
        return mangled
    arguments = re.findall(r"L[bi](\d+)E", name[2] or "")
    return name[1] + (f"<{','.join(arguments)}>" if arguments else "")


def _row_loop(code: sass.Code) -> list[sass.Instruction]:
    """The shortest of the loops with most special functions: cold code behind a loop that jumps back into its middle
    looks like a longer one."""
    found = [(sass.count(loop)["MUFU"], loop) for loop in code.loops("MUFU")]
    most = max((count for count, _ in found), default=0)
    return min((loop for count, loop in found if 2 * count > most), key=len, default=[])


def _product_loops(code: sass.Code) -> list[list[sass.Instruction]]:
    """Those with tensor core instructions and no copies. Where there are none, the shortest with any: in
    ``projected_hakd_kernel<2,4,0,0>`` the next slice's copies count, too, in every layout, and it looks slower."""
    found = sorted(code.loops("HMMA"), key=len)
    return [loop for loop in found if not sass.count(loop)["LDGSTS"]] or found[:1]


def _staging(code: sass.Code) -> collections.Counter:
    """Opcodes of the loops around stores of 16 bytes to shared memory, together."""
    found = map(sass.count, code.loops("STS.128"))
    return sum((opcodes for opcodes in found if not opcodes["HMMA"]), collections.Counter())


def inspect(cubin: Path) -> list[Kernel]:
    """Every kernel of a compiled file."""
    usage = triton_static._run(triton_static._tool("cuobjdump"), "-res-usage", str(cubin))
    used = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    disassembly = triton_static._run(triton_static._tool("nvdisasm"), "-c", "-hex", str(cubin))
    kernels = []
    for mangled, code in sass.parse(disassembly).items():
        opcodes = sass.count(code.instructions)
        wide = sum(i.opcode.startswith("LDG.E.128") for i in code.instructions)
        kernels.append(Kernel(
            _readable(mangled), *used[mangled], _row_loop(code), opcodes, wide, _product_loops(code), _staging(code)
        ))  # fmt: skip
    return kernels


def kernel_of(launch: triton_static.Launch, classes: int) -> tuple[str, int]:
    """The CUDA kernel that does what a launch of Triton's does, and the lanes that share a pixel."""
    lanes = 1
    while lanes < 32 and classes > lanes * CLASSES_PER_THREAD:
        lanes *= 2
    single = int(lanes == 1)
    if launch.name == "hakd_kernel":
        return f"hakd_kernel<1,2,{int(launch.constants['PROJ'])},{single}>", lanes
    return f"segmentation_kernel<{int(launch.constants['HAS_TEACHER'])},1,0,{single}>", lanes


def compile_file(source: Path, target: str, folder: Path) -> Path:
    """A cubin of a .cu file."""
    cubin = folder / f"{source.stem}_{target}.cubin"
    options = ["-std=c++20", "-O3", *STRICT, f"-arch={target}", "-cubin"]
    command = [nvcc() or "nvcc", *options, "-o", str(cubin), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return cubin


def disassemble(source: Path, target: str, folder: Path) -> str:
    return triton_static._run(triton_static._tool("nvdisasm"), "-c", str(compile_file(source, target, folder)))


def compile_kernels(target: str) -> dict[str, Kernel]:
    """All kernels by name."""
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(source for source in SOURCES.glob("*/*.cu") if source.parent.name != "core")
        files = [compile_file(source, target, Path(folder)) for source in sources]
        return {kernel.name: kernel for file in files for kernel in inspect(file)}


class Kernels(dict[str, Kernel]):
    """A target's kernels by name, each compiled when it is first asked for: all that the library has take minutes."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = target

    def __missing__(self, name: str) -> Kernel:
        print(f"nvcc: {name}, {self._target}", file=sys.stderr, flush=True)
        template, _, arguments = name.rstrip(">").partition("<")
        if template == "projected_hakd_kernel":
            arguments = f"ProjectedShape<{arguments}>"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.cu"
            source.write_text(ALONE.format(folder=SOURCES, kernel=f"{template}<{arguments}>"))
            (found,) = inspect(compile_file(source, self._target, Path(folder)))
        self[name] = found
        return found


def built_kernels(library: Path, target: str) -> dict[str, Kernel]:
    """As :func:`compile_kernels`, of a library that has machine code for the target; else of none."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [triton_static._tool("cuobjdump"), "-xelf", "all", str(library.resolve())]
        subprocess.run(extract, cwd=folder, check=True, capture_output=True, text=True)
        files = sorted(Path(folder).glob(f"*.{target}.cubin"))
        return {kernel.name: kernel for file in files for kernel in inspect(file)}


COLUMNS = ("kernel", "classes", "target", "registers", "bytes spilled", "warps per SM",
           "instructions per (pixel, class)", "of these special functions")  # fmt: skip


PROJECTED_COLUMNS = ("kernel on features", "serves", "target", "registers", "bytes spilled", "warps per SM",
                     "instructions in all", "tensor core (HMMA)", "asynchronous copies (LDGSTS)")  # fmt: skip


def _markdown(rows: list[tuple[object, ...]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def table(targets: list[str]) -> str:
    rows: list[tuple[object, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    features: list[tuple[object, ...]] = [PROJECTED_COLUMNS, ("---",) * len(PROJECTED_COLUMNS)]
    for target in targets:
        compiled = Kernels(target)
        for name, (what, classes) in SHIPPED.items():
            k = compiled[name]
            rows.append((what, classes, target, k.registers, k.stack_bytes, k.warps(target), f"{k.instructions:.1f}",
                         f"{k.special_functions:.1f}"))  # fmt: skip
        for name, what in PROJECTED.items():
            k = compiled[name]
            features.append((name.split("<")[0], what, target, k.registers, k.stack_bytes, k.warps(target, 256),
                             sum(k.code.values()), k.code["HMMA"], k.code["LDGSTS"]))  # fmt: skip
    return f"{_markdown(rows)}\n\n{_markdown(features)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = [t for t in triton_static.TARGETS if t.startswith("sm_")]
    parser.add_argument("--targets", nargs="+", choices=targets, default=["sm_90"])
    print(table(parser.parse_args().targets))


if __name__ == "__main__":
    main()
