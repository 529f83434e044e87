"""What the model of benchmarks/gpu_model.py predicts for this card, latency included, from the machine code on it.

Bandwidth is the measured one where that is known, the rest are the card's figures; **predicted**, never measured.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import records, tools
from .case import Case, Data, DidNotRun
from .device import Device

CLOCK = 1.98  # GHz: Hopper's boost clock
BANDWIDTH = 4800.0  # GB/s: an H200's by its data sheet
NAMES = {
    ("hakd_kernel (label resolution)", 19): "hakd K=19",
    ("hakd_kernel (feature resolution)", 19): "hakd K=19, feature resolution",
    ("hakd_kernel (label resolution)", 150): "hakd K=150",
    ("segmentation_kernel (CE + KD)", 19): "CE + KD K=19",
    ("segmentation_kernel (CE)", 19): "CE K=19",
    ("segmentation_kernel (CE + KD)", 150): "CE + KD K=150",
}
PROJECTED = {19: "projected K=19", 150: "projected K=150"}


def card(device: Device) -> Any:
    from .. import gpu_model

    facts, earlier = device.facts(), records.latest(records.read(tools.folder() / records.RESULTS))
    copied = earlier.get("machine/copy bandwidth")
    measured = copied.data.get("GB/s") if copied and device.kind == "cuda" else None
    capability = facts["capability"] or (9, 0)
    count = facts["multi_processor_count"] if device.kind == "cuda" else 132
    target = f"sm_{capability[0]}{capability[1]}"
    return gpu_model.Card(device.name, target, count, CLOCK, measured or BANDWIDTH, 128, 1024)


def pixel_launches(classes: int) -> dict[str, Any]:
    """By the name of the timed size."""
    from .. import triton_static

    launches = [x for x in triton_static.paper_launches(torch.float32, classes) if not x.constants.get("PROJ")]
    named = {NAMES.get((triton_static.describe(x), classes)): x for x in launches}
    return {name: launch for name, launch in named.items() if name}


def _row(times: dict[str, float]) -> Data:
    cause = max(times, key=times.__getitem__)
    return {"detail": f"{times[cause]:.3f} ms, bound by {cause}", "ms": times[cause], "causes": times}


def triton(name: str, device: Device) -> Data:
    from .. import gpu_model, triton_static

    here = card(device)
    classes = 150 if "150" in name else 19
    if name.startswith("projected"):
        times = gpu_model.predict_features(here, triton_static.projected_launches(torch.float32, classes))
        return _row({"the longest of each launch": gpu_model.longest(times)[1]})
    launch = pixel_launches(classes)[name]
    return _row(gpu_model.triton_loop(launch, here.target, classes).times(here, launch))


def library_kernels() -> dict[str, Any]:
    """Every kernel of the library that runs."""
    from .. import cuda_static, triton_static

    found = sorted((tools.ROOT / "hetero_kernels").glob("libhetero_kernels_cuda.*"))
    if not found:
        raise DidNotRun("the CUDA library was not built")
    with tempfile.TemporaryDirectory() as folder:
        tool = triton_static._tool("cuobjdump")
        command = ["sh", "-c", 'cd "$1" && "$2" -xelf all "$3"', "sh", folder, tool, str(found[0])]
        done = tools.run(command, 60)
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            raise DidNotRun(f"no machine code could be taken from the library: {done.tail(1)}")
        return {kernel.name: kernel for cubin in cubins for kernel in cuda_static.inspect(cubin)}


def cuda(device: Device) -> Data:
    """All sizes at once: disassembly is what takes time."""
    from .. import cuda_model, gpu_model, triton_static

    here, kernels = card(device), library_kernels()
    rows = {}
    for classes in (19, 150):
        for name, launch in pixel_launches(classes).items():
            rows[name] = _row(gpu_model.cuda_loop(launch, here.target, classes, kernels).times(here, launch))
        arguments = triton_static.projected_launches(torch.float32, classes)[0].arguments
        shape = {name: arguments[name].data.shape for name in ("student", "teacher")}
        student, teacher = shape["student"], shape["teacher"]
        call = cuda_model.Call(student[0], classes, (student[2], student[3]), (student[1], teacher[1]))
        times = cuda_model.predict(here, call, kernels)
        rows[PROJECTED[classes]] = _row({"the longest of each launch": gpu_model.longest(times)[1]})
    return {"detail": "; ".join(f"{k}: {v['detail']}" for k, v in rows.items()), "rows": rows}


def cases() -> list[Case]:
    names = [*NAMES.values(), *PROJECTED.values()]
    return [
        Case("predicted/cuda", cuda, rehearse=True, limit=70),
        *(Case(f"predicted/{name}, triton", functools.partial(triton, name), rehearse=name == "CE K=19", limit=70)
          for name in names),
    ]  # fmt: skip
