"""What can be said of the GPU kernels without a GPU, CUDA's first where there is an nvcc. No time is measured.

python -m benchmarks.gpu_static [--targets sm_90 gfx942]
python -m benchmarks.gpu_static --predict
"""

from __future__ import annotations

import argparse
import os

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

from . import cuda_static, gpu_model, triton_static  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = {"choices": triton_static.TARGETS, "default": ["sm_80", "sm_90", "gfx942"]}
    parser.add_argument("--targets", nargs="+", **targets)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32"])
    parser.add_argument("--predict", action="store_true", help="the model of gpu_model.py instead: predicted times")
    options = parser.parse_args()
    if options.predict:
        return print(gpu_model.table())
    names = {v: k for k, v in triton_static.DTYPES.items()}
    if cuda_static.nvcc():
        nvidia = [t for t in options.targets if t.startswith("sm_")]
        print(f"CUDA, every dtype\n\n{cuda_static.table(nvidia)}\n\nTriton\n")
    print(triton_static.table(options.targets, [names[d] for d in options.dtypes]))


if __name__ == "__main__":
    main()
