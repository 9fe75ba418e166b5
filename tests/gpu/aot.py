"""Compile the Triton kernels for real GPUs, on a machine without any, and look at what came out; run by .ci/kernels.

    python tests/gpu/aot.py sm_80 sm_90 sm_100 gfx942

Prints registers, spilled bytes and shared memory of every kernel in every configuration. Fails where one spills, takes more
registers than it may, fuses a multiplication with an addition where masses are computed, or hands partial results over without
a barrier, a release and loads past the first cache.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from decal.kernels import gpu
from decal.kernels.program import Op

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
AMD_REGISTERS = 256
"""Of the 512 of a lane."""
TYPES = {"float32": ("*fp32", 3.4028234663852886e38), "bfloat16": ("*bf16", 3.3895313892515355e38)}
POINTERS = {
    "code_ptr": "*i32", "regs_ptr": "*fp64", "maps_ptr": "*fp64", "state_ptr": "*i64", "initial_ptr": "*fp64",
    "columns_ptr": "*i32", "parameters_ptr": "*fp64", "bins_ptr": "*i32", "list_ptr": "*fp32", "ranked_ptr": "*fp32",
    "pieces_ptr": "*fp32", "lanes_ptr": "*fp64", "seeds_ptr": "*i64", "positions_ptr": "*i64", "scores_ptr": "*fp64",
    "places_ptr": "*i32", "tokens_ptr": "*i64",
}  # fmt: skip
SELECTIONS = (Op.COUNT_UPPER, Op.MASS_UPPER, Op.NEAREST)


class Job(NamedTuple):
    """A kernel and its constants. Among these Triton counts a V of 1."""

    kernel: Any
    label: str
    constants: dict[str, Any]
    warps: int
    registers: int
    dtype: str


def jobs() -> list[Job]:
    """Every kernel in every configuration of the table, on float32; and those that touch logits on bfloat16, once."""
    found = []
    for number, (_, config) in enumerate(gpu.TABLE):
        for dtype in ("float32", "bfloat16")[: 2 if number == 1 else 1]:
            wide = {"BLOCK": config.block}
            shared = {"TOP": TYPES[dtype][1], "BLOCK": config.narrow}

            usual = (config.warps, gpu.REGISTERS[config.warps])

            def add(kernel: Any, label: str, dtype=dtype, shared=shared, usual=usual, **more: Any) -> None:
                limits = gpu.RANKING if kernel is gpu.ranking else usual
                found.append(Job(kernel, label, {**shared, **more}, *limits, dtype))

            add(gpu.extremes, "extremes start", START=True, **wide)
            add(gpu.write, "write mask", LIMIT=shared["TOP"], MASK=True, **wide)
            add(gpu.write, "write values", LIMIT=shared["TOP"], MASK=False, **wide)
            if dtype != "float32":
                continue
            add(gpu.extremes, "extremes", START=False, **wide)
            add(gpu.runner_up, "runner_up", **wide)
            add(gpu.moments, "moments", BLOCK=config.narrow // 2)
            for op in SELECTIONS:
                block = gpu.bin_block(config, op)
                selection = {"NB": gpu.bins_for(config, op), "KIND": int(op)}
                add(gpu.count_bins, f"count_bins {op.name.lower()}", BLOCK=block, LISTED=0, **selection)
                add(gpu.choose, f"choose {op.name.lower()}", ROOM=config.room, **selection)
            one_token = {"NB": config.bins, "KIND": int(Op.MASS_UPPER)}
            listed = {"NB": config.bins, "KIND": int(Op.COUNT_UPPER), "LISTED": config.room}
            add(gpu.count_bins, "count_bins list", BLOCK=gpu.bin_block(config, Op.COUNT_UPPER), **listed)
            add(gpu.list_top, "list_top", NB=config.bins, ROOM=config.room)
            add(gpu.ranking, "ranking", PIECE=config.piece, ROOM=config.room, NB=config.bins // 2)
            add(gpu.curvature, "curvature")
            if number == 0:
                add(gpu.count_bins, "count_bins of 1", BLOCK=gpu.bin_block(config, Op.MASS_UPPER), V=1, LISTED=0, **one_token)
                add(gpu.choose, "choose of 1", V=1, ROOM=config.room, **one_token)
                add(gpu.list_top, "list_top of 1", V=1, NB=config.bins, ROOM=config.room)
                add(gpu.ranking, "ranking of 1", V=1, PIECE=config.piece, ROOM=config.room, NB=config.bins // 2)
            add(gpu.race, "race", PARTS=triton.next_power_of_2(config.splits))
    return found


def compiled(job: Job, target: GPUTarget) -> Any:
    """The kernel for a target."""
    signature, attributes = {}, {}
    for place, name in enumerate(job.kernel.arg_names):
        if name in job.constants:
            signature[name] = "constexpr"
            continue
        if name in ("x_ptr", "y_ptr"):
            signature[name] = TYPES[job.dtype][0]
        else:
            signature[name] = POINTERS.get(name, "i64" if name.endswith("stride") else "i32")
        if name.endswith("_ptr") or name == "V":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(job.kernel, signature, job.constants, attributes)
    options = {"num_warps": job.warps, "enable_fp_fusion": False}
    if target.backend == "cuda":
        options["maxnreg"] = job.registers
    return triton.compile(source, target=target, options=options)


class Report(NamedTuple):
    """What a kernel takes, and what is wrong with it."""

    registers: int
    spilled: int
    shared: int
    faults: list[str]


def examine(job: Job, result: Any) -> Report:
    """Resources and faults."""
    return nvidia(job, result) if "cubin" in result.asm else amd(job, result)


def nvidia(job: Job, result: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage", file.name)))
        registers, spilled = int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
        # A frame that nobody touches is no spill.
        if spilled and not re.search(r"\b(LDL|STL)\b", dump("-sass", file.name)):
            spilled = 0
    faults = limits(registers, spilled, job.registers) + read_ptx(job, result.asm["ptx"])
    return Report(registers, spilled, result.metadata.shared, faults)


def dump(what: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", what, path], capture_output=True, text=True, check=True).stdout


def amd(job: Job, result: Any) -> Report:
    text = result.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(re.escape(name) + r":\s*(\d+)", text)[1])

    spilled = number(".vgpr_spill_count") + number(".private_segment_fixed_size")
    faults = limits(number(".vgpr_count"), spilled, AMD_REGISTERS)
    if combines(job) and not re.search(r"buffer_wbl2 sc1.*?global_atomic_add.*?buffer_inv sc1", text, re.S):
        faults.append("hands over without release and acquire")
    return Report(number(".vgpr_count"), spilled, result.metadata.shared, faults)


def limits(registers: int, spilled: int, bound: int) -> list[str]:
    return [*(["spills"] if spilled else []), *(["takes too many registers"] if registers > bound else [])]


def combines(job: Job) -> bool:
    """Whether several programs of a row add up what they find."""
    return job.kernel not in (gpu.write, gpu.ranking, gpu.runner_up, gpu.list_top)


def read_ptx(job: Job, ptx: str) -> list[str]:
    """Faults that the assembly shows."""
    faults = []
    lines = [line.strip() for line in ptx.splitlines()]
    if combines(job):
        arrivals = [i for i, line in enumerate(lines) if ".acq_rel" in line and "atom" in line]
        if len(arrivals) != 1:
            faults.append(f"{len(arrivals)} arrivals")
        for i in arrivals:
            before, behind = lines[:i], lines[i:]
            barrier = max((j for j, line in enumerate(before) if "bar.sync" in line), default=-1)
            if barrier < 0 or any(re.search(r"\b(st\.global|red|atom)\.", line) for line in before[barrier:]):
                faults.append("arrives without a barrier behind its last store")
            if not any("ld.global.cg" in line for line in behind):
                faults.append("reads partial results from the first cache")
    # Library functions fuse on purpose; their bodies are inlined, and hold constants that the mass doesn't.
    if mass_is_fused(lines):
        faults.append("fuses the mass")
    return faults


def mass_is_fused(lines: list[str]) -> bool:
    """Whether a coefficient of the polynomial goes into a fused multiply-add."""
    from struct import pack

    from decal.kernels.mass import COEFFICIENTS, LOG2E, ROUND

    theirs = {f"0d{pack('>d', c).hex().upper()}" for c in (*COEFFICIENTS[1:], ROUND, LOG2E)}
    moved = {m[1]: m[2] for line in lines if (m := re.match(r"mov\.[bf]64\s+(%\w+), (0d[0-9A-F]{16})", line))}
    for line in lines:
        if line.startswith("fma.rn.f64"):
            for operand in re.findall(r"%\w+|0d[0-9A-F]{16}", line):
                if moved.get(operand, operand) in theirs - SHARED_WITH_LIBRARY:
                    return True
    return False


SHARED_WITH_LIBRARY = {"0d3FF71547652B82FE", "0d4338000000000000"}
"""log2(e) and the rounding constant, which the library's exp uses as well."""


def target_of(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def main(names: list[str]) -> int:
    faulty = 0
    for name in names:
        begin = time.monotonic()
        print(f"{name:<34} block warps registers spilled shared")
        for job in jobs():
            report = examine(job, compiled(job, target_of(name)))
            label = f"{job.label} {job.dtype}"
            print(
                f"  {label:<32} {job.constants['BLOCK']:>5} {job.warps:>5} {report.registers:>9} {report.spilled:>7} "
                f"{report.shared:>6}  {', '.join(report.faults)}",
                flush=True,
            )
            faulty += bool(report.faults)
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{faulty} faulty kernels" if faulty else "all kernels are as they should be")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["sm_80", "sm_90", "sm_100", "gfx942"]))
