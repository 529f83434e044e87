"""Projectors within wrappers, who alone know where the parameters are: FSDP, DistributedDataParallel, torch.compile."""

import processes
import pytest
import torch
import torch.distributed as dist
from cases import make_labels, relative_l2

from hetero_kernels import HeteroAKDLoss

CONFIGURATIONS = [("conv", "feature"), ("conv_bn", "feature"), ("conv_bn", "label")]  # the first two in one pass
WRAPPERS = ("FSDP", "FSDP, own parameters", "DDP")

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP
from hetero_kernels import HeteroAKDLoss
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
case = torch.load(f"{folder}/case.pt", weights_only=False)
losses = {}
for key, (state, projector, resolution) in case["modules"].items():
    module = HeteroAKDLoss(8, 12, 5, projector=projector, resolution=resolution)
    module.load_state_dict(state)
    module.eval()
    for name in ("student_projector", "teacher_projector"):
        inner = getattr(module, name)
        if key[0] == "DDP":
            outer = DDP(inner)
        else:
            outer = FSDP(inner, use_orig_params="own" in key[0], device_id=torch.device("cpu"))
        setattr(module, name, outer)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses[key] = []
    for _ in range(2):
        loss = module(*case["batch"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[key].append(loss.item())
if rank == 0:
    torch.save(losses, f"{folder}/out.pt")
dist.barrier()
dist.destroy_process_group()
"""


def make(projector, resolution):
    torch.manual_seed(1)
    return HeteroAKDLoss(8, 12, 5, projector=projector, resolution=resolution).eval()


def make_batch():
    torch.manual_seed(0)
    return torch.randn(2, 8, 6, 7), torch.randn(2, 12, 6, 7), make_labels(2, (12, 14), 5)


def two_steps(module, batch):
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
    for _ in range(2):
        loss = module(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_sharded_and_replicated(tmp_path):
    """Two processes of one batch each learn what one does."""
    modules = {
        (wrapper, *configuration): (make(*configuration).state_dict(), *configuration)
        for wrapper in WRAPPERS
        for configuration in CONFIGURATIONS
    }
    torch.save({"modules": modules, "batch": make_batch()}, tmp_path / "case.pt")
    workers = [processes.Process("-c", WORKER, str(tmp_path), str(rank)) for rank in (0, 1)]
    ended = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    for (_, *configuration), losses in torch.load(tmp_path / "out.pt").items():
        expected = two_steps(make(*configuration), make_batch())
        assert expected[0] != expected[1]
        assert relative_l2(torch.tensor(losses), torch.tensor(expected)) <= 1e-5, configuration


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_compiled(configuration):
    module = make(*configuration)
    for name in ("student_projector", "teacher_projector"):
        setattr(module, name, torch.compile(getattr(module, name), backend="eager"))
    expected = two_steps(make(*configuration), make_batch())
    assert relative_l2(torch.tensor(two_steps(module, make_batch())), torch.tensor(expected)) <= 1e-5
