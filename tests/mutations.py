"""Plants mistakes in a copy of the Triton kernels and records which test notices.

    python tests/mutations.py             # all, a table on the standard output
    python tests/mutations.py --write     # and into tests/README.md
    python tests/mutations.py wrong-halo  # by name

A mutation is a text of one file and what it becomes. The interpreter's tests run on the copy until one fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = "hetero_kernels/triton"
PIXELS, TILINGS, FEATURES = (
    "tests/triton_backend/test_interpreted_pixel_losses.py",
    "tests/triton_backend/test_interpreted_tuning.py",
    "tests/test_projected_losses.py",
)
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"


@dataclass(frozen=True)
class Mutation:
    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest -k
    within: str = PIXELS


MUTATIONS = (
    Mutation("wrong-halo", "the right neighbour is the left one", "tile.py",
             "tl.minimum(left + 1, network.width - 1)", "tl.minimum(left, network.width - 1)", "hakd_shapes and label"),
    Mutation("lost-row", "the upper coarse row of a band gets no gradient", "reduction.py",
             "(cell < row) | (row == network.height - 1), 1.0, 0.0", "(row == network.height - 1), 1.0, 0.0",
             "hakd_shapes and label"),
    Mutation("short-reach", "the last tile that reaches a coarse column is left out", "reduction.py",
             "ok = inside & (tile <= last_tile)", "ok = inside & (tile < last_tile)", "shapes"),
    Mutation("dropped-mask", "ignored pixels have gradients", "tile.py",
             "tl.where(valid[None, :], g[i], 0.0)", "g[i]", "hakd_options or nan"),
    Mutation("dropped-padding", "logits beyond K count", "tile.py",
             "return z + tl.where(c < classes, 0.0, PADDING)", "return z", "many or thousand"),
    Mutation("missing-rescale", "the online maximum of kem='spatial' does not rescale its sum", "spatial.py",
             "sums[i] * exp_nonpositive(highest[i] - now) + e", "sums[i] + e", "spatial"),
    Mutation("missing-rescale-parts", "nor where programs are combined", "spatial.py",
             "sums = sums * exp_nonpositive(highest - now) + s * exp_nonpositive(m - now)",
             "sums = sums + s", "spatial"),
    Mutation("swapped-networks", "teacher for student in the mixture", "hakd_math.py",
             "w_h = w_s + step", "w_h = w_t - step", "hakd_options"),
    Mutation("naive-log", "log(1 + e^z) by way of 1 + e^z", "pixel_math.py",
             "f = tl.fma(e, scale, scale - 1.0)", "f = (1.0 + e) * scale - 1.0", "absolute"),
    Mutation("unguarded-large-logits", "the bounded mathematics everywhere", "launch.py",
             "return min(24.0,", "return 1e9 + min(24.0,", "large"),
    Mutation("guarded-label", "the guarded path forgets the label", "hakd_math.py",
             "return softplus(tl.where(labelled, -z, z))", "return softplus(z)", "large"),
    Mutation("unlabelled-anchor", "the anchor is evaluated as if it had no label", "hakd_math.py",
             "sign = tl.where(same, -1.0, 1.0)", "sign = tl.where(same, 1.0, 1.0)", "hakd_options"),
    Mutation("anchor-in-the-sum", "no class is kept apart: differences of numbers near 1", "segmentation_math.py",
             "error = -rest * inverse", "error = at_label * inverse - 1.0", "absolute"),
    Mutation("wrong-divisor", "the mean divides by all pixels", "tile.py",
             "counts = pixels.inside & (label != labels.ignore_index)", "counts = pixels.inside", "hakd_options"),
    Mutation("missing-upstream", "reduction='none' forgets the upstream gradient", "pixel_losses.py",
             "UPSTREAM=upstream is not None", "UPSTREAM=False", "none"),
    Mutation("sampled-low", "labels sampled by a scale that is an ulp too small", "launch.py",
             "float(np.float32(n) / np.float32(max(m, 1)))", "float(n / max(m, 1) * (1 - 1e-7))", "labels or feature"),
    Mutation("missing-temperature", "the gradient lacks the factor T", "hakd_math.py",
             "hot = temperature * hakd_factor", "hot = hakd_factor", "hakd_options"),
    Mutation("split-overlap", "a tall band's programs share a row", "tile.py",
             "end = tl.minimum(begin + ROWS,", "end = tl.minimum(begin + ROWS + 1,", "tall or coarse"),
    Mutation("loop-missing-rescale", "the loop over classes does not rescale the others' sum", "many_classes.py",
             "h_others * h_scale", "h_others", "maxima", TILINGS),
    Mutation("loop-forgotten-anchor", "the third visit has no anchor", "many_classes.py",
             "z_s, z_t, c == a, labelled", "z_s, z_t, c < 0, labelled", "looped_accuracy", TILINGS),
    Mutation("loop-empty-slots", "programs without rows leave their slots unwritten", "many_classes.py",
             "classes, CLASSES):\n            c", "visited(pixels, classes), CLASSES):\n            c", "looped_shapes",
             TILINGS),
    Mutation("loop-row-weights", "both coarse rows get the lower one's weight", "many_classes.py",
             "(g[0] * site.part[None, :],))", "(g[0] * (1.0 - site.part)[None, :],))", "looped_shapes", TILINGS),
    Mutation("small-parts", "products of float32 lose what a tensor core's 11 bits do not hold", "features.py",
             "out = tl.dot(small, y_big, out", "out = tl.dot(small * 0.0, y_big, out", "triton and values", FEATURES),
    Mutation("nan-features", "features of ignored pixels reach the weights' gradient", "features.py",
             "tl.where(valid[None, :], tl.where(c[:, None]", "tl.where(valid[None, :] | True, tl.where(c[:, None]",
             "triton and only_pixels", FEATURES),
    Mutation("lost-split", "a part of the weights' gradient is left out", "features.py",
             "for split in range(0, splits):", "for split in range(0, splits - (splits > 1)):", "triton and layouts",
             FEATURES),
    Mutation("bias-channel", "the bias's gradient is read from the last weight's column", "features.py",
             "mask=inside & (c == network.channels)", "mask=inside & (c == network.channels - 1)", "triton and values",
             FEATURES),
    Mutation("wrong-rows", "rows that do not follow each other are read as if they did", "projected_losses.py",
             "return height == 1 or width == 1 or", "return True or", "triton and layouts", FEATURES),
    Mutation("unscaled-features", "the features' gradient lacks the incoming one", "projected_losses.py",
             "sums *= tl.load(factor).to(tl.float32)", "sums *= 1.0", "triton and values", FEATURES),
)  # fmt: skip


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails on the mutated copy, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "hetero_kernels", copy / "hetero_kernels", ignore=ignore)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignore)
        path = copy / KERNELS / mutation.file
        text = path.read_text()
        if mutation.old not in text:
            raise ValueError(f"mutation {mutation.name!r}: {mutation.file} has no text {mutation.old!r}")
        path.write_text(text.replace(mutation.old, mutation.new))
        pytest = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder}
        command = [*pytest, mutation.within, "-k", mutation.tests]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"mutation {mutation.name!r}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    failed = re.search(r"^FAILED \S+::(\S.*?)(?: - .*)?$", done.stdout, re.M)
    return failed[1] if failed else None


def table(mutations: tuple[Mutation, ...]) -> str:
    rows = ["| mutation | what is wrong | file | noticed by |", "|---|---|---|---|"]
    for mutation in mutations:
        found = caught_by(mutation)
        rows.append(
            f"| {mutation.name} | {mutation.what} | {mutation.file} | {f'`{found}`' if found else '**nothing**'} |"
        )
        print(rows[-1], flush=True)
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutations; all where none is named")
    parser.add_argument("--write", action="store_true", help="write the table into tests/README.md")
    options = parser.parse_args()
    unknown = set(options.names) - {m.name for m in MUTATIONS}
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = tuple(m for m in MUTATIONS if not options.names or m.name in options.names)
    text = table(chosen)
    if options.write:
        readme = ROOT / "tests" / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return int("**nothing**" in text)


if __name__ == "__main__":
    sys.exit(main())
