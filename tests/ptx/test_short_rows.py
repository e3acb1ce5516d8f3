"""Short rows of 16-bit floats that start anywhere: how many instructions a row takes, counted in what was compiled for a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from triton import knobs

from fused_ops import fused_softmax
from fused_ops.testing import ContractMode
from fused_ops.testing.ptx.gpu import Launch, device

# (columns, instructions a row of the forward, of the backward): what memory allows at 197 columns is 235
MOST = [(101, 90, 75), (197, 140, 130), (255, 140, 130), (333, 290, None)]


def instructions(launch: Launch, folder: Path) -> int:
    """The instructions of a warp over the kernel's text, which has no loop, without what pads it."""
    path = folder / f"{launch.kernel}.cubin"
    path.write_bytes(launch.compiled.asm["cubin"])
    text = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", text, re.MULTILINE)
    assert found.count("BRA") <= 1  # the last, to itself
    return len(found) - found.count("NOP") - found.count("BRA")


@pytest.mark.parametrize(("N", "forward", "backward"), MOST)
def test_instructions_of_a_row(N: int, forward: int, backward: int | None, tmp_path: Path) -> None:
    x = torch.randn(96, N).bfloat16().requires_grad_()
    with device(90, sms=1) as gpu, ContractMode() as mode:
        fused_softmax(x).backward(torch.randn(x.shape).bfloat16())
    assert len(mode.checked) == 2
    launches = {launch.kernel: launch for launch in gpu.launches}
    for kernel, most in (("softmax_fwd_kernel", forward), ("softmax_bwd_kernel", backward)):
        launch = launches[kernel]
        if most is None:
            continue
        source = launch.compiled.src
        constants = {name: source.constants.get((i,)) for i, name in enumerate(source.fn.arg_names)}
        assert (constants["VEC"], constants["EDGES"], launch.compiled.metadata.num_warps) == (1, False, 1)
        assert "bar.sync" not in launch.compiled.asm["ptx"]
        assert constants["BLOCK_M"] > 1
        assert instructions(launch, tmp_path) <= most * constants["BLOCK_M"], launch.kernel
