"""Everything that only a GPU can say about the GPU backends, in one command of seven minutes.

    python -m benchmarks.gpu_check --output runs/gpu [--deadline 400] [--only FAILED] [--allow-no-gpu]

What a stage may take of 400 seconds; what runs side by side takes them together, and what is left over goes on to those
after it (plan.py):

| seconds | stage | what it tells |
|---|---|---|
| 20 | machine | versions, clocks, copy bandwidth, matrix products |
| 170 | build | the CUDA library, in place, for this card |
| | triton | twelve processes share the Triton kernels' correctness cases and one cache |
| 75 | cuda | the same cases of the CUDA kernels |
| | sanitizer | memcheck, racecheck and initcheck of our operators alone, 60 s each |
| | predicted | the model's times for this card, from the machine code that runs |
| 50 | times | forward and backward of both backends and eager: plain, replayed from a graph; host time, memory |
| 35 | ncu | speed of light, stalls, memory, occupancy, instructions, local memory of the main kernels |
| 20 | tilings | every tiling of the Triton tables |
| 25 | compiled | torch.compile of the reference |
| 5 | | the report |

Every stage is a process with a time limit, every case runs in a worker that may crash or hang alone, and every case
leaves a line in results.jsonl: "passed", "failed" or "did not run" with the reason. In the folder: report.md (read this
first), results.jsonl, build.log, stages.log, sanitizer.log, ncu.csv.
"""

import time

BEGIN = time.monotonic()  # of this process, torch's import included
