"""Three examples on two processes of torchrun's agent, one after another: importing them takes longer than running
them, so that it is done once, before the processes are forked."""

import sys
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    huggingface_trainer.main(["--output", f"{folder}/huggingface", "--steps", "20", "--save-every", "20"])
    options = ["--devices", "2", "--precision", "bf16-mixed"]
    lightning_module.main(["--output", f"{folder}/lightning", "--epochs", "3", *options])
    AcceleratorState._reset_state()  # Trainer had one, in another precision
    accelerate_loop.main(["--output", f"{folder}/accelerate", "--epochs", "3", "--precision", "bf16"])  # ends the group


if __name__ == "__main__":
    import accelerate_loop
    import huggingface_trainer
    import lightning_module
    from accelerate.state import AcceleratorState

    config = LaunchConfig(
        1, 1, 2, run_id="examples", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
    )
    elastic_launch(config, main)(sys.argv[1])
