"""NeoBERT-MoBA. Every class runs alone in one process; torch.distributed is never imported here, only a `Mesh`."""
