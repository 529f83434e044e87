"""HeteroAKD for semantic segmentation: a thin trainer around the losses of `hetero_kernels`.

The command `heteroakd` is in `cli`, what its subcommands do in `commands`, the training loop in `training.loop`.
"""
