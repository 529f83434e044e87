"""SyncBatchNorm projectors: two processes against batch norm on the joint batch."""

import processes
import pytest
import torch
from cases import make_labels, relative_l2
from torch import nn

from hetero_kernels import HeteroAKDLoss

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = {}
for key, case in torch.load(f"{folder}/cases.pt", weights_only=False).items():
    module, part = case["module"], case["parts"][rank]
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    inputs = [x.clone().requires_grad_() for x in part[:2]]
    out = module(*inputs, part[2], normalizer=case["count"] / 2)
    gradients = torch.autograd.grad(out.loss, [*inputs, *module.parameters()])
    found[key] = [out.loss.detach(), *gradients, *module.buffers()]
torch.save(found, f"{folder}/out{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def results(module, student, teacher, labels, normalizer):
    inputs = [x.clone().requires_grad_() for x in (student, teacher)]
    out = module(*inputs, labels, normalizer=normalizer)
    gradients = torch.autograd.grad(out.loss, [*inputs, *module.parameters()])
    return [out.loss.detach(), *gradients, *module.buffers()]


CASES = [(projector, first) for projector in ("conv_bn", "conv_bn_relu") for first in (1, 3, 0)]


def make(projector, first):
    """The module, the joint batch with its count of valid pixels, and the processes' parts."""
    torch.manual_seed(0)
    module = HeteroAKDLoss(8, 12, 5, projector=projector)
    for p in (module.student_projector, module.teacher_projector):
        nn.init.normal_(p[1].weight, 1.0, 0.3)
        nn.init.normal_(p[1].bias)
    student, teacher = torch.randn(4, 8, 6, 7) + 20, torch.randn(4, 12, 3, 4) - 5
    student[2:] += 3  # the processes' means differ
    labels = make_labels(4, (24, 28), 5)
    parts = [tuple(x[s] for x in (student, teacher, labels)) for s in (slice(first), slice(first, None))]
    return module, (student, teacher, labels), (labels != 255).sum(), parts


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every case's results of both processes, which have one life for all of them."""
    folder = tmp_path_factory.mktemp("sync")
    cases = {}
    for case in CASES:
        module, _, count, parts = make(*case)
        cases[case] = {"module": module, "parts": parts, "count": count.float()}
    torch.save(cases, folder / "cases.pt")
    workers = [processes.Process("-c", WORKER, str(folder), str(rank)) for rank in (0, 1)]
    ended = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    return [torch.load(folder / f"out{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("projector", "first"), CASES)
def test_two_processes_are_one_batch(found, projector, first):
    """However many images a process has, none included."""
    module, (student, teacher, labels), count, _ = make(projector, first)
    ours = [results[projector, first] for results in found]
    expected = results(module.double(), student.double(), teacher.double(), labels, count)
    assert relative_l2((ours[0][0] + ours[1][0]) / 2, expected[0]) <= 1e-6
    for i in (1, 2):
        assert relative_l2(torch.cat((ours[0][i], ours[1][i])) / 2, expected[i]) <= 1e-6, i
    parameters = len(list(module.parameters()))
    for i in range(3, 3 + parameters):  # as DistributedDataParallel averages them
        assert relative_l2((ours[0][i] + ours[1][i]) / 2, expected[i]) <= 2e-6
    for a, b, e in zip(ours[0][3 + parameters :], ours[1][3 + parameters :], expected[3 + parameters :], strict=True):
        assert torch.equal(a, b) and relative_l2(a, e) <= 1e-6
