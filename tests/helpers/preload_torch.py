"""What the second server of `warm` imports: all that a run needs and that reads no variable of the Hub."""

import gc

import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.data  # noqa: F401

gc.collect()
gc.freeze()
