"""What can be said of the GPU kernels without a GPU, CUDA's first where there is an nvcc. No time is measured.

python -m benchmarks.gpu_static [--targets sm_90 gfx942]
python -m benchmarks.gpu_static --predict [--targets sm_90]
"""

from __future__ import annotations

import argparse
import os

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

from . import cuda_static, gpu_model, triton_static  # noqa: E402
from .cards import CARDS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [card.target for card in CARDS]
    parser.add_argument(
        "--targets", nargs="+", choices=triton_static.TARGETS,
        help=f"default: sm_80 sm_90 gfx942; with --predict, which knows a card of each: {' '.join(known)}",
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32"])
    parser.add_argument("--predict", action="store_true", help="the model of gpu_model.py instead: predicted times")
    options = parser.parse_args()
    if options.predict:
        if unknown := set(options.targets or ()) - set(known):
            parser.error(f"--predict knows a card of {', '.join(known)}; --targets names {', '.join(sorted(unknown))}")
        if options.dtypes != ["fp32"]:
            parser.error(f"--predict knows fp32 alone; --dtypes names {', '.join(options.dtypes)}")
        for line in gpu_model.table([card for card in CARDS if card.target in (options.targets or known)]):
            print(line, flush=True)
        return
    options.targets = options.targets or ["sm_80", "sm_90", "gfx942"]
    names = {v: k for k, v in triton_static.DTYPES.items()}
    if cuda_static.nvcc():
        nvidia = [t for t in options.targets if t.startswith("sm_")]
        print(f"CUDA, every dtype\n\n{cuda_static.table(nvidia)}\n\nTriton\n")
    print(triton_static.table(options.targets, [names[d] for d in options.dtypes]))


if __name__ == "__main__":
    main()
