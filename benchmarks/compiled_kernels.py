"""What the Triton kernels become, compiled without a GPU: registers, spills, loads, barriers.

    python -m benchmarks.compiled_kernels           a table
    python -m benchmarks.compiled_kernels --json    the same, a JSON object a line
    python -m benchmarks.compiled_kernels --page    what GPUs is asked of, as docs/gpu.md has it

Every shipped configuration is compiled for each of ARCHITECTURES, and for the SMALL ones what takes
most shared memory, with the argument properties the launcher would find (pointers and widths that
are multiples of 16). NVIDIA code is read back with the `cuobjdump` that Triton ships. `local_bytes`
counts the stack a thread spills to.
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
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_kernels import dual_triton, prefix_attention, rows_triton
from opcd_kernels.options import DIVERGENCES, KINDS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SMALL = ("sm_86", "sm_89", "sm_120")  # less shared memory: what takes most of it, of each kernel
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Build(NamedTuple):
    """One configuration of one kernel."""

    kernel: Any
    facts: dict[str, Any]  # what a user chooses
    types: dict[str, str]  # of arguments; the others are fp32 pointers, i32 or constants
    constants: dict[str, Any]
    threads: int
    stages: int = 3
    architectures: tuple[str, ...] = ARCHITECTURES
    aligned: tuple[str, ...] = ("V", "width", "D_s", "D_t")  # beside pointers and strides
    fused: bool = True  # products and sums may be rounded once


def divergence_builds() -> Iterator[Build]:
    """Plain or with every option, with a gradient or without; beside target ids."""
    for kind, (gradient, dz, options, targets) in itertools.product(
        (*DIVERGENCES, "mixture"),
        [
            (True, "bf16", False, False),
            (True, "bf16", True, False),
            (True, "fp32", True, False),
            (False, "bf16", False, False),
            (False, "bf16", True, False),
            (True, "bf16", False, True),
            (True, "bf16", True, True),
        ],
    ):
        largest = kind == "mixture" and options and targets
        yield Build(
            rows_triton.divergence_rows_kernel,
            {
                "divergence": kind,
                "gradient": gradient,
                "dz": dz,
                "options": options,
                "targets": targets,
            },
            {"dz_ptr": f"*{dz}", "targets_ptr": "*i64"}
            | dict.fromkeys(("beta", "rest", "softcap_s", "softcap_t", "inv_temperature"), "fp32"),
            {
                "DIVERGENCE": KINDS.index(kind),
                **dict.fromkeys(("BIAS_S", "BIAS_T", "SOFTCAP_S", "SOFTCAP_T"), options),
                "TARGETS": targets,
                "GRADIENT": gradient,
                "BLOCK_V": rows_triton.BLOCK_V,
            },
            rows_triton.THREADS,
            fused=rows_triton.FUSED,
            architectures=(*ARCHITECTURES, *(SMALL if largest else ())),
        )


def odd_vocabulary_builds() -> Iterator[Build]:
    """V as in GPT-2, 50257: nothing is known of it but that rows are padded to `row_width`."""
    for build in divergence_builds():
        if build.facts["gradient"] and build.facts["divergence"] == "reverse_kl":
            facts = build.facts | {"divergence": "reverse_kl, odd V"}
            yield build._replace(facts=facts, aligned=("width",), architectures=("sm_80", "sm_90"))


def attention_builds() -> Iterator[Build]:
    """Heads as in Gemma 2 (256 wide), Mistral (128) and gpt-oss (64, sinks), bf16."""
    kernel = prefix_attention.prefix_attention_kernel
    for width, group, softcap, sinks in (
        (256, 2, True, False),
        (128, 4, False, False),
        (64, 8, False, True),
    ):
        block_g, block_d = triton.next_power_of_2(group), triton.next_power_of_2(width)
        block_q, block_n, warps, stages = prefix_attention.tile(block_g, block_d, itemsize=2)
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        yield Build(
            kernel,
            {"head": width, "group": group, "softcap": softcap, "sinks": sinks},
            dict.fromkeys(pointers, "*bf16")
            | dict.fromkeys(("cu_seqlens_ptr", "prefix_bounds_ptr"), "*i32")
            | {"scale": "fp32", "softcap": "fp32"},
            {
                "G": group,
                "D": width,
                "BLOCK_G": block_g,
                "BLOCK_D": block_d,
                "BLOCK_Q": block_q,
                "BLOCK_N": block_n,
                "WINDOW": True,
                "SOFTCAP": softcap,
                "SINKS": sinks,
            },
            32 * warps,
            stages,
            (*ARCHITECTURES, *SMALL),
        )


def dual_product_builds() -> Iterator[Build]:
    """Two heads, or one for both models; where there is a copy engine."""
    tile = dual_triton.Tile()
    hidden, entries = f"{tile.tokens}, {tile.depth}", f"{tile.entries}, {tile.depth}"
    out = f"{tile.tokens}, {tile.entries}"
    blocks = dict.fromkeys(("hs_desc", "ht_desc"), hidden) | dict.fromkeys(
        ("ws_desc", "wt_desc"), entries
    )
    blocks |= dict.fromkeys(("e_desc", "x_desc"), out)
    for divergence, shared in itertools.product(DIVERGENCES, (False, True)):
        yield Build(
            dual_triton.dual_product_kernel,
            {"divergence": divergence, "shared": shared, "tile": out},
            {k: f"tensordesc<bf16[{block}]>" for k, block in blocks.items()}
            | {"inv_temperature": "fp32"},
            {
                "DIVERGENCE": DIVERGENCES.index(divergence),
                "SHARED": shared,
                "STATISTICS": dual_triton.STATISTICS,
                "BLOCK_C": tile.tokens,
                "BLOCK_V": tile.entries,
                "BLOCK_D": tile.depth,
                "GROUP_C": tile.group,
            },
            tile.threads,
            tile.stages,
            ("sm_90", "sm_100"),
        )


def dual_rows_builds() -> Iterator[Build]:
    """With a gradient or without."""
    for divergence, gradient in itertools.product(DIVERGENCES, (True, False)):
        entries = dual_triton.Tile().entries
        yield Build(
            dual_triton.dual_rows_kernel,
            {"divergence": divergence, "gradient": gradient},
            {"e_ptr": "*bf16", "x_ptr": "*bf16", "beta": "fp32", "rest": "fp32"},
            {
                "DIVERGENCE": DIVERGENCES.index(divergence),
                "GRADIENT": gradient,
                "STATISTICS": dual_triton.STATISTICS,
                "TILES": dual_triton.ENTRIES // entries,
                "BLOCK_V": entries,
                "LANES": dual_triton.LANES,
            },
            dual_triton.THREADS,
            architectures=("sm_90", "sm_100"),
        )


def compiled(build: Build, architecture: str) -> dict:
    """Compile one configuration for one architecture and read the machine code."""

    def type_of(name: str) -> str:
        if name in build.constants:
            return "constexpr"
        return build.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    signature = {name: type_of(name) for name in build.kernel.arg_names}
    aligned = [
        (i,)
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("stride") or name in build.aligned
    ]
    source = ASTSource(
        fn=build.kernel,
        signature=signature,
        constexprs=build.constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    nvidia = architecture.startswith("sm_")
    target = (
        GPUTarget("cuda", int(architecture[3:]), 32)
        if nvidia
        else GPUTarget("hip", architecture, 64)
    )
    options = {
        "num_warps": build.threads // target.warp_size,
        "num_stages": build.stages,
        "enable_fp_fusion": build.fused,
    }
    binary = triton.compile(source, target=target, options=options)
    report = {
        "kernel": build.kernel.__name__,
        "architecture": architecture,
        **build.facts,
        "threads": build.threads,
        "shared_bytes": binary.metadata.shared,
        "asked_barriers": len(re.findall(r"\bbarrier\b", binary.asm["ttgir"])),
    }
    if not nvidia:
        return report | _amd(binary.asm["amdgcn"])
    fused = len(re.findall(r"\bfma\.rn\.f32\b", binary.asm["ptx"]))
    return report | {"fused": fused} | _nvidia(binary.asm["cubin"])


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
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b", sass)),
        "products": len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass)),
        "barriers": len(re.findall(r"\bBAR\.SYNC", sass)),
        "exponentials": len(re.findall(r"\bMUFU\.EX2\b", sass)),
        "half_stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.U?16\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.(?:64|128)\b", sass)),
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
        "products": len(re.findall(r"\bv_mfma_", assembly)),
        "barriers": len(re.findall(r"\bs_barrier\b", assembly)),
        "exponentials": len(re.findall(r"\bv_exp_f32", assembly)),
        "half_stores": len(re.findall(r"\b(?:global|buffer)_store_(?:short|b16)\b", assembly)),
        "wide_stores": len(
            re.findall(r"\b(?:global|buffer)_store_(?:dwordx[24]|b64|b128)\b", assembly)
        ),
    }


PAGE = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def page_builds() -> Iterator[tuple[str, Build]]:
    """What a run meets: a name, and the configuration."""
    for build in divergence_builds():
        of, kind = build.facts, build.facts["divergence"]
        if of["gradient"] and of["dz"] == "bf16" and not of["targets"]:
            yield f"rows, {kind}{', biases and softcaps' if of['options'] else ''}", build
    for build in attention_builds():
        yield f"attention, heads {build.facts['head']} wide", build
    for build in dual_product_builds():
        if build.facts["divergence"] == "reverse_kl":
            heads = "one head" if build.facts["shared"] else "two heads"
            yield f"dual product, {heads}", build
    for build in dual_rows_builds():
        if build.facts["divergence"] == "reverse_kl" and build.facts["gradient"]:
            yield "dual rows", build


def page() -> Iterator[str]:
    """Lines of Markdown: registers a thread, KiB of shared memory a program, spilled bytes."""
    yield "| | " + " | ".join(PAGE) + " |"
    yield "|---" * (len(PAGE) + 1) + "|"
    for name, build in page_builds():
        everywhere = build.architectures == ARCHITECTURES
        cells = [
            _cell(compiled(build, architecture))
            if everywhere or architecture in build.architectures
            else "–"
            for architecture in PAGE
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _cell(report: dict) -> str:
    spilled = f", {report['local_bytes']} spilled" if report["local_bytes"] else ""
    return f"{report['registers']} / {report['shared_bytes'] / 1024:.1f}{spilled}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--page", action="store_true", help="a table for docs/gpu.md")
    args = parser.parse_args()
    if args.page:
        for line in page():
            print(line, flush=True)
        return
    as_json = args.json
    kinds = (
        *(divergence_builds, odd_vocabulary_builds),
        *(dual_product_builds, dual_rows_builds, attention_builds),
    )
    for builds in kinds:
        widths = None
        for architecture, build in itertools.product((*ARCHITECTURES, *SMALL), builds()):
            if architecture not in build.architectures:
                continue
            report = compiled(build, architecture)
            if as_json:
                print(json.dumps(report), flush=True)
                continue
            if widths is None:
                print(f"\n{report['kernel']}")
                widths = {key: max(len(key), 10) for key in report if key != "kernel"}
                print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
            print("  ".join(f"{report[k]!s:>{width}}" for k, width in widths.items()), flush=True)


if __name__ == "__main__":
    main()
