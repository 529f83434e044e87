"""Three examples on the processes of one torchrun, one after another: importing them takes longer than running them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def main(folder: str) -> None:
    import accelerate_loop
    import huggingface_trainer
    import lightning_module
    import torch
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    huggingface_trainer.main(["--output", f"{folder}/huggingface", "--steps", "20", "--save-every", "20"])
    options = ["--devices", "2", "--precision", "bf16-mixed"]
    lightning_module.main(["--output", f"{folder}/lightning", "--epochs", "3", *options])
    AcceleratorState._reset_state()  # Trainer had one, in another precision
    accelerate_loop.main(["--output", f"{folder}/accelerate", "--epochs", "3", "--precision", "bf16"])  # ends the group


if __name__ == "__main__":
    main(sys.argv[1])
