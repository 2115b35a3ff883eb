"""Running a compiled network as it is."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["uncompiled"]


def uncompiled() -> AbstractContextManager[Any]:
    """Let what ``torch.compile`` has compiled run as it is inside the block, and compile nothing.

    Compiled functions cannot be differentiated twice, and compiling one for a few passes takes longer than it saves.
    """
    is_in_use = "torch._dynamo" in sys.modules  # which takes seconds to import
    return torch.compiler.set_stance("force_eager") if is_in_use else nullcontext()
