"""What the Triton kernels become, compiled without a GPU: registers, spills, loads, barriers.

    python benchmarks/compiled_kernels.py           a table
    python benchmarks/compiled_kernels.py --json    the same, a JSON object a line

Every shipped configuration is compiled for each architecture below, with the argument properties
the launcher would find (pointers and widths that are multiples of 16). NVIDIA code is read back
with the `cuobjdump` that Triton ships. `local_bytes` counts the stack a thread spills to.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_kernels import rows_triton
from opcd_kernels.options import DIVERGENCES

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def configurations() -> Iterator[dict]:
    """The kernel's compile-time choices: plain or with every option, gradient or not."""
    for divergence, (gradient, dz, options) in itertools.product(
        DIVERGENCES,
        [
            (True, "bf16", False),
            (True, "bf16", True),
            (True, "fp32", True),
            (False, "bf16", False),
            (False, "bf16", True),
        ],
    ):
        yield {"divergence": divergence, "gradient": gradient, "dz": dz, "options": options}


def compiled(configuration: dict, architecture: str) -> dict:
    """Compile one configuration for one architecture and read the machine code."""
    kernel = rows_triton.divergence_rows_kernel
    c = configuration
    constants = {
        "DIVERGENCE": DIVERGENCES.index(c["divergence"]),
        **dict.fromkeys(("BIAS_S", "BIAS_T", "SOFTCAP_S", "SOFTCAP_T"), c["options"]),
        "GRADIENT": c["gradient"],
        "BLOCK_V": rows_triton.BLOCK_V,
    }
    integers = ("stride_dz", "V", "width")
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{c['dz']}"
        if name == "dz_ptr"
        else "*fp32"
        if name.endswith("_ptr")
        else "i32"
        if name in integers
        else "fp32"
        for name in kernel.arg_names
    }
    aligned = [
        (i,) for i, name in enumerate(signature) if name.endswith("_ptr") or name in integers
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    nvidia = architecture.startswith("sm_")
    target = (
        GPUTarget("cuda", int(architecture[3:]), 32)
        if nvidia
        else GPUTarget("hip", architecture, 64)
    )
    warps = rows_triton.THREADS // target.warp_size
    binary = triton.compile(source, target=target, options={"num_warps": warps})
    report = {
        "kernel": kernel.__name__,
        "architecture": architecture,
        **c,
        "shared_bytes": binary.metadata.shared,
    }
    return report | (_nvidia(binary.asm["cubin"]) if nvidia else _amd(binary.asm["amdgcn"]))


def _nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    )
    return {
        "registers": registers,
        "local_bytes": stack + local,
        "wide_loads": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", sass)),
        "barriers": len(re.findall(r"\bBAR\.SYNC", sass)),
    }


def _amd(assembly: str) -> dict:
    registers, spilled, private = (
        int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return {
        "registers": registers,
        "local_bytes": 4 * spilled + private,
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        "barriers": len(re.findall(r"\bs_barrier\b", assembly)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    as_json = parser.parse_args().json
    widths = None
    for architecture, configuration in itertools.product(ARCHITECTURES, configurations()):
        report = compiled(configuration, architecture)
        if as_json:
            print(json.dumps(report), flush=True)
            continue
        if widths is None:
            print(f"{report['kernel']}, {rows_triton.THREADS} threads a program")
            widths = {key: max(len(key), 10) for key in report if key != "kernel"}
            print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
        print("  ".join(f"{report[k]!s:>{width}}" for k, width in widths.items()), flush=True)


if __name__ == "__main__":
    main()
