"""torch.compile of the networks' blocks: how it is set up, and whether it works on this machine."""

import torch

from train_cc.io.errors import InputError
from train_cc.models.network import SiTBlock
from train_cc.run.session import Session

RECOMPILE_LIMIT = 64  # both networks, with and without gradient, autocast, batch sizes; torch's own is 8


def configure_compiler() -> None:
    """Blocks are compiled whole, and for every case that a run has, rather than left uncompiled from some point on.

    DDP would have torch cut a block's graph at the ends of its buckets; gradients of one block after another overlap
    with their reduction without that. Small kernels that do not wait for one another, such as the casts of weights,
    become one where that is faster by the card's own clock.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._inductor.config.combo_kernels = True
    torch._inductor.config.benchmark_combo_kernel = True


def require_compiler() -> None:
    """Compile and run a small block of the networks, forward and backward, under autocast, at two batch sizes.

    Raises `InputError` if `torch.compile` cannot do it on this machine.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = SiTBlock(hidden_size=64, num_heads=2, mlp_ratio=4.0).to(device)
    try:
        compiled = torch.compile(lambda x: block(x, x.mean(dim=1)))
        for batch in (2, 3):
            x = torch.zeros(batch, 16, 64, device=device, requires_grad=True)
            with torch._dynamo.config.patch(suppress_errors=False), torch.autocast(device):
                out = compiled(x)
            out.float().sum().backward()
    except Exception as error:  # whatever the missing piece raises
        words = " ".join(str(error).strip().splitlines()[:2])
        missing = "Triton" if device == "cuda" else "a C++ compiler such as g++"
        raise InputError(
            f"--compile found no working compiler on this machine: {missing} is needed, and did not compile a small "
            f"block, forward and backward. Install it, or leave --compile away ({type(error).__name__}: {words})"
        ) from error


def compiler_works(asked: bool | str, session: Session) -> bool:
    """True if blocks are compiled, as ``asked``: "auto" is only on CUDA, if a compiler is found; else the log says so.

    Raises `InputError` where it was asked for, and there is none.
    """
    if not asked or (asked == "auto" and session.device.type != "cuda"):
        return False
    configure_compiler()
    try:
        require_compiler()
    except InputError as error:
        if asked != "auto":
            raise
        session.notes.append(f"WARNING: nothing is compiled, and every update takes longer: {error}")
        return False
    torch._dynamo.config.suppress_errors = asked == "auto"  # a block that cannot be compiled runs as it is
    return True
