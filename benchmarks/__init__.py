"""Benchmarks: our backends beside eager PyTorch and torch.compile, in one run.

``make bench`` writes docs/performance.md, ``make bench-quick`` prints a table.

``cases`` holds the shapes, ``steps`` and ``distillation`` the one set-up of each that time and memory share, ``timing``
and ``memory`` measure, ``run`` writes all measurements into one JSON file, ``report`` and ``plots`` turn it into pages.
``pytest benchmarks/bench_<stem>.py`` is the quick look at one stem with pytest-benchmark.
"""
