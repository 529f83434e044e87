"""`Distiller` over two gloo processes: what the global normalizer is, DistributedDataParallel, FSDP2, replicas."""

from __future__ import annotations

import sys
from pathlib import Path

import processes
import pytest
import torch
from distiller_cases import by_hand, loss_by_hand, make_batch, make_distiller

from hetero_kernels import check_replicas, mean_over_processes

STEPS = 3


def optimizer_of(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def networks(**options):
    """Without batch norm, so that processes with a part of the batch each can do what one does with the whole."""
    return make_distiller(student={"norm": False}, projector="conv", **options)


def full(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def worker(folder: str, rank: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, labels = (each.chunk(2)[rank] for each in make_batch())
    found = {}

    def steps(distiller, module, name):
        optimizer = optimizer_of(module.parameters())
        losses = []
        for _ in range(STEPS):
            out = module(images, labels, normalizer=mean_over_processes(distiller.divisors(labels)))
            optimizer.zero_grad()
            out.loss.backward()
            if not losses:
                found[f"{name} gradients"] = [full(parameter.grad) for parameter in distiller.parameters()]
            optimizer.step()
            losses.append(out.loss.detach())
        losses = torch.stack(losses)
        dist.all_reduce(losses)
        found[f"{name} losses"] = losses / 2
        found[f"{name} weights"] = [full(parameter) for parameter in distiller.parameters()]

    for name, options in (("label", {}), ("feature", {"resolution": "feature"}), ("several", {"several": True})):
        distiller = networks(**options)
        parallel = DistributedDataParallel(distiller)
        steps(distiller, parallel, name)
        check_replicas(distiller)
        assert len(list(parallel.parameters())) == len(list(distiller.parameters()))

    distiller = networks()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(distiller.student.stage, mesh=mesh)
    fully_shard(distiller.student, mesh=mesh)
    fully_shard(distiller, mesh=mesh)
    steps(distiller, distiller, "sharded")

    forgotten = networks()  # only the student is wrapped: projectors drift apart
    student = DistributedDataParallel(forgotten.student)
    optimizer = optimizer_of(forgotten.parameters())
    for _ in range(2):
        loss_by_hand(student.module, forgotten.teacher, forgotten.criterion, images, labels).backward()
        optimizer.step()
    try:
        check_replicas(forgotten.criterion)
    except RuntimeError as error:
        found["drift"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("processes"))
    program = "import sys; sys.path[:0] = {!r}; from test_distiller_processes import worker; worker({!r}, {})"
    path = [str(Path(__file__).parent), *sys.path]
    workers = [processes.Process("-c", program.format(path, folder, rank)) for rank in (0, 1)]
    ended = [worker.communicate(300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


def in_one_process(**options):
    """The same steps on the whole batch: by hand where that is one tap."""
    distiller = networks(**options)
    student, teacher, criterion = by_hand(distiller)
    images, labels = make_batch()
    modules = (distiller,) if options.get("several") else (student, criterion)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer, losses, gradients = optimizer_of(parameters), [], []
    for _ in range(STEPS):
        if options.get("several"):
            loss = distiller(images, labels).loss
        else:
            loss = loss_by_hand(student, teacher, criterion, images, labels)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or [full(parameter.grad) for parameter in parameters]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients, parameters


@pytest.mark.parametrize("name", ["label", "feature", "several", "sharded"])
def test_two_processes_train_as_one_with_the_whole_batch(found, name):
    """Normalised by the global counts divided by the world size: the gradient is that of the joint batch, to 1e-6."""
    options = {"feature": {"resolution": "feature"}, "several": {"several": True}}.get(name, {})
    losses, gradients, parameters = in_one_process(**options)
    for each in found:
        torch.testing.assert_close(each[f"{name} losses"], losses, rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(each[f"{name} gradients"], gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9
        for ours, theirs in zip(each[f"{name} weights"], parameters, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_projectors_left_outside_are_named_on_every_process(found):
    for each in found:
        assert "parameters differ between processes: student_projector.0.weight by " in each["drift"]


def test_alone_the_helpers_change_nothing():
    distiller = make_distiller()
    divisors = distiller.divisors(make_batch()[1])
    mean = mean_over_processes(divisors)
    assert mean.keys() == divisors.keys() and all(torch.equal(mean[n], v.float()) for n, v in divisors.items())
    check_replicas(distiller)


@pytest.mark.parametrize("wrong", [{}, {"task": 3}, {"task": torch.ones(2)}, torch.ones(())], ids=str)
def test_what_are_no_divisors_is_said(wrong):
    with pytest.raises(TypeError, match="divisors.* is .*expected"):
        mean_over_processes(wrong)
