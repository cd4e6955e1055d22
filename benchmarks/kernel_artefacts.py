"""What the compilers make of the Triton kernels: `python -m benchmarks.kernel_artefacts`. No GPU is needed.

The launchers of `qnoise.kernels.gpu` run on CPU tensors under a driver that names a GPU and launches nothing, so what
is compiled is what a launch on that GPU would compile: the same compile-time arguments, the same facts about alignment.
From the artefacts come registers, spills, shared memory, the width of loads and stores, and for NVIDIA the instructions
of one thread along the path it takes, for each element it works on. "ALU" are the instructions of the integer, logic
and compare pipe, which has half the rate of the floating-point pipe and is the first to fill up.

Writes benchmarks/results/kernel_artefacts.json; `--check` compares with it instead and fails where a count grew by more
than 10 %.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.environment import environment
from benchmarks.files import RESULTS, read_json, write_json
from qnoise.formats import FORMATS, QuantSpec
from qnoise.kernels.gpu.amax import rotated_amax, tensor_amax
from qnoise.kernels.gpu.fake_quantize import fake_quantize_rows
from qnoise.kernels.gpu.log_probs import log_prob_backward, log_prob_forward
from qnoise.kernels.gpu.pack import quantize_rows
from qnoise.kernels.gpu.unpack import dequantize_rows

RESULT = RESULTS / "kernel_artefacts.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Instructions of the half-rate pipe, by the first part of their name.
ALU = frozenset(
    re.findall(
        r"\w+",
        """BMSK F2FP FCHK FLO FMNMX FMNMX3 FSEL FSETP HMNMX2 HSETP2 IABS IADD IADD3 ISETP LEA LOP3 P2R PLOP3 POPC PRMT
        R2P SEL SGXT SHF VABSDIFF VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3""",
    )
)


@dataclass(frozen=True)
class Artefact:
    """One compiled kernel.

    Attributes:
        target: a key of `TARGETS`.
        text: PTX or AMD assembly.
        threads: threads of a program.
        shared: bytes of shared memory.
        registers: registers of a thread.
        local: bytes of stack, local or scratch memory of a thread; spilled registers are in there.
        path: NVIDIA: instructions on the shortest way through the kernel, which is the one ordinary numbers take.
    """

    target: str
    text: str
    threads: int
    shared: int
    registers: int
    local: int
    path: Counter[str]

    @property
    def nvidia(self) -> bool:
        return self.target.startswith("sm_")

    @property
    def alu(self) -> int:
        return sum(count for name, count in self.path.items() if name in ALU)

    def accesses(self) -> Counter[str]:
        """Global loads and stores, as `load 128` → how many of this number of bits."""
        found: Counter[str] = Counter()
        if self.nvidia:
            for kind, count, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v([248]))?\.b(\d+)", self.text):
                found[f"{'load' if kind == 'ld' else 'store'} {int(count or 1) * int(bits)}"] += 1
        else:
            widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16}
            pattern = r"\b(?:global|buffer)_(load|store)_(dwordx[234]|dword|u?short|[us]?byte)"
            for kind, width in re.findall(pattern, self.text):
                found[f"{kind} {widths.get(width, 8)}"] += 1
        return found


@contextlib.contextmanager
def compiled_for(target: str) -> Iterator[list[Artefact]]:
    """Inside, a launch of a Triton kernel compiles it for ``target``, appends the artefact to the list, and returns."""
    artefacts: list[Artefact] = []
    launch, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.device_caches.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        artefacts.append(read_artefact(target, kernel))
        self.device_caches.clear()
        return kernel

    try:
        driver.set_active(_Driver(TARGETS[target]))
        JITFunction.run = compile_only
        yield artefacts
    finally:
        JITFunction.run = launch
        driver._active = active


class _Driver:
    """A driver as far as compiling needs one."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def read_artefact(target: str, kernel: Any) -> Artefact:
    metadata = kernel.metadata
    if "ptx" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, local = (
            int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        return Artefact(target, text, metadata.num_warps * 64, metadata.shared, registers, local, Counter())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        listing = _output("nvdisasm", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    threads = metadata.num_warps * 32
    return Artefact(
        target,
        kernel.asm["ptx"],
        threads,
        metadata.shared,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        shortest_path(listing),
    )


def _output(binary: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / binary, *arguments], capture_output=True, text=True, check=True).stdout


def shortest_path(listing: str) -> Counter[str]:
    """Instructions on the shortest way from the entry of a SASS listing to its end.

    A branch is taken or not, whichever is shorter: this leaves out the care for the ends of the number range (slow
    paths of divisions, rare blocks) and runs a loop once. Masks are predicates, not branches, so no load or store is
    left out. Uniform-datapath instructions are issued once for a warp and are counted like the others.

    Raises:
        ValueError: no way leads to an EXIT.
    """
    names: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"^([.$]\S+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            names.append((found[2].split(".")[0], found[3], bool(found[1])))
    # Distances to the end, relaxed until nothing changes: kernels have a few hundred instructions and few branches.
    distance = [math.inf] * (len(names) + 1)
    follow = [0] * len(names)
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(names))):
            name, operands, predicated = names[i]
            goals = [i + 1]
            if name == "EXIT" and not predicated:
                best, goal = 1.0, -1
            else:
                jump = re.search(r"`\((\S+)\)", operands)
                # ptxas also leaves a loop by a CALL to a label of the same kernel; `$…` is a function, a slow path.
                if name == "BRA" or (name == "CALL" and jump and jump[1].startswith(".L")):
                    # `@P0 BRA` has its predicate in front, `BRA.DIV UR4, …` and `BRA P0, …` among the operands.
                    goals = [i + 1, labels[jump[1]]] if predicated or "," in operands else [labels[jump[1]]]
                elif name in ("CALL", "RET", "BRX", "JMX"):
                    goals = [i + 1] if predicated else []
                best, goal = min(((1 + distance[g], g) for g in goals), default=(math.inf, -1))
            if best < distance[i]:
                distance[i], follow[i], changed = best, goal, True
    if math.isinf(distance[0]):
        raise ValueError("no way leads from the entry of this SASS listing to its end")
    path: Counter[str] = Counter()
    i = 0
    while i >= 0:
        if names[i][0] != "NOP":
            path[names[i][0]] += 1
        i = follow[i]
    return path


@dataclass(frozen=True)
class Kernel:
    """One launch of a launcher: a name, how to run it, the elements a program works on (along the path that is
    counted), and the accesses that may be narrower than 128 bits: scales, divisors, one number a row."""

    name: str
    launch: Callable[[], object]
    tile: int
    narrow: frozenset[str]


ROWS, COLUMNS = 64, 4096
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def quantizers(spec: QuantSpec, dtype: str) -> list[Kernel]:
    """The kernels of one format: fake-quantize, pack, unpack."""
    x = torch.zeros(ROWS, COLUMNS, dtype=DTYPES[dtype])
    out = torch.empty_like(x)
    block = spec.block_format
    divisor = torch.ones(()) if block.per_tensor_scale else None
    codes = torch.zeros(ROWS, COLUMNS * block.element.bits // 8, dtype=torch.uint8)
    scales = torch.zeros(ROWS, COLUMNS // block.block_size, dtype=torch.uint8)
    seed = (1, 2) if spec.rounding == "stochastic" else None
    gs = {"load 32"} if block.per_tensor_scale else set()
    # Three 32-bit words hold sixteen 6-bit codes.
    words = {"load 32", "store 32"} if block.element.bits == 6 else set()
    stored, loaded = {"store 8", "store 16"}, {"load 8", "load 16"}
    label = f"{spec} {dtype}"
    return [
        Kernel(
            f"fake_quantize {label}",
            lambda: fake_quantize_rows(x, spec, divisor, seed, out),
            2048,
            frozenset(gs),
        ),
        Kernel(
            f"pack {label}",
            lambda: quantize_rows(x, spec, divisor, seed, codes, scales),
            4096,
            frozenset(gs | words | stored),
        ),
        Kernel(
            f"unpack {label}",
            lambda: dequantize_rows(codes, scales, divisor, spec, out),
            4096,
            frozenset(gs | words | loaded),
        ),
    ]


def with_noise(spec: QuantSpec, dtype: str) -> list[Kernel]:
    """Relative noise fused into fake-quantize, and into the maximum that fixes a per-tensor scale."""
    x = torch.zeros(ROWS, COLUMNS, dtype=DTYPES[dtype])
    z = torch.zeros(ROWS, COLUMNS)
    divisor = torch.ones(()) if spec.block_format.per_tensor_scale else None
    noise = (z, 0.01)
    narrow = frozenset() if divisor is None else frozenset({"load 32"})
    kernels = [
        Kernel(
            f"fake_quantize {spec} noise {dtype}",
            lambda: fake_quantize_rows(x, spec, divisor, None, x, noise),
            2048,
            narrow,
        )
    ]
    if spec.per_tensor_scale:
        kernels.append(Kernel(f"tensor_amax noise {dtype}", lambda: tensor_amax(x, noise), 4096, frozenset()))
    return kernels


def others(dtype: str) -> list[Kernel]:
    """The kernels that know no format. A loop is counted once, with what stands around it."""
    x = torch.zeros(ROWS, COLUMNS, dtype=DTYPES[dtype])
    rotated = QuantSpec("nvfp4", rotation="hadamard")
    ids = torch.zeros(ROWS, dtype=torch.int64)
    row = torch.zeros(ROWS)
    numbers = frozenset({"load 16", "load 32", "load 64", "store 32"})
    return [
        Kernel(f"tensor_amax {dtype}", lambda: tensor_amax(x), 4096, frozenset()),
        Kernel(f"tensor_amax hadamard {dtype}", lambda: rotated_amax(x, rotated), 4096, frozenset()),
        Kernel(f"log_prob_forward {dtype}", lambda: log_prob_forward(x, ids, 1.0), 4096, numbers),
        Kernel(
            f"log_prob_backward {dtype}",
            lambda: log_prob_backward(x, ids, 1.0, (row, row, row), (row, row), torch.empty_like(x)),
            4096,
            numbers,
        ),
    ]


def compiled(kernel: Kernel, target: str) -> Artefact:
    with compiled_for(target) as artefacts:
        kernel.launch()
    (artefact,) = artefacts
    return artefact


FORBIDDEN = {
    r"\bdiv\.(approx|full)": "an approximate division",
    r"\brcp\.approx|v_rcp_(?!f32)": "an approximate reciprocal",
    r"\.ftz\b": "flushing of subnormal numbers",
    r"\b(div|rem)\.[su](32|64)": "an integer division",
    r"\.f64\b": "fp64 arithmetic",
    r"\b(ld|st)\.local|scratch_(load|store)": "local memory",
}


def faults(kernel: Kernel, artefact: Artefact) -> list[str]:
    """What must not be in a kernel, whatever its speed."""
    found = [what for pattern, what in FORBIDDEN.items() if re.search(pattern, artefact.text)]
    # The number of a program is divided once; logarithms are taken of numbers from 1 on.
    allowed = {"tensor_amax": "an integer division", "log_prob_forward": "flushing of subnormal numbers"}
    found = [what for what in found if what != allowed.get(kernel.name.split()[0])]
    if artefact.local:
        found.append(f"{artefact.local} bytes of local memory a thread: spilled registers")
    accesses = artefact.accesses()
    # AMD runs 64 threads where NVIDIA runs 32, so packed words come two to a thread.
    narrow = kernel.narrow if artefact.nvidia else kernel.narrow | {"load 64", "store 64"}
    if unexpected := {name for name in accesses if not name.endswith(" 128")} - narrow:
        found.append(f"accesses of less than 128 bits: {', '.join(sorted(unexpected))}")
    if not any(name.endswith(" 128") for name in accesses):
        found.append("no access of 128 bits")
    # A sum of a product, contracted, would have one rounding less than the reference has. Exact quotients are fused on
    # purpose, and only E4M3 scales need them.
    fused = len(re.findall(r"\bfma\.rn\.f32|\bv_(?:pk_)?fma", artefact.text)) + artefact.path["FFMA"]
    if fused and re.match(r"(fake_quantize|pack|unpack) mx", kernel.name) and artefact.nvidia:
        found.append("a product and a sum were contracted")
    return found


def row(kernel: Kernel, artefact: Artefact) -> dict[str, Any]:
    each = kernel.tile / artefact.threads
    values: dict[str, Any] = {"target": artefact.target, "kernel": kernel.name, "registers": artefact.registers}
    if artefact.nvidia:
        values["instructions_per_element"] = round(sum(artefact.path.values()) / each, 2)
        values["alu_per_element"] = round(artefact.alu / each, 2)
        values["fused"] = artefact.path["FFMA"]
    return values | {"shared": artefact.shared, "accesses": dict(sorted(artefact.accesses().items()))}


def recorded_kernels(target: str) -> Iterator[Kernel]:
    """What stands in the result file: on sm_90 everything, elsewhere the two 4-bit formats."""
    for fmt, block in FORMATS.items():
        for dtype in DTYPES if target == "sm_90" else ["bf16"]:
            if target == "sm_90" or fmt in ("mxfp4", "nvfp4"):
                yield from quantizers(QuantSpec(fmt), dtype)
        if target == "sm_90":
            for mode in block.scale_modes[1:] if fmt in ("mxfp4", "nvfp4") else ():
                if (fmt, mode) != ("nvfp4", "mse"):  # a loop over 17 candidates, of which one would be counted
                    yield quantizers(QuantSpec(fmt, mode), "bf16")[0]
            if fmt in ("mxfp4", "nvfp4"):
                yield from (quantizers(QuantSpec(fmt, rounding=r), "bf16")[0] for r in ("half_away", "stochastic"))
        if fmt in ("mxfp4", "nvfp4"):
            yield from quantizers(QuantSpec(fmt, rotation="hadamard"), "bf16")
            yield from with_noise(QuantSpec(fmt), "bf16")
    yield from others("bf16")


def grown(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Where a kernel needs more than was recorded: counts by 10 %, registers by 10 %, fused operations at all."""
    found = []
    for key in ("instructions_per_element", "alu_per_element", "registers"):
        if key in before and now[key] > 1.1 * before[key]:
            found.append(f"{key}: {now[key]}, recorded {before[key]}")
    if now.get("fused", 0) != before.get("fused", 0):
        found.append(f"fused multiply-adds: {now['fused']}, recorded {before['fused']}")
    return found


def read_recorded() -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["target"], each["kernel"]): each for each in read_json(RESULT)["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the recorded counts, write nothing")
    arguments = parser.parse_args()
    recorded = read_recorded() if arguments.check else {}
    rows, wrong = [], []
    for target in TARGETS:
        for kernel in recorded_kernels(target):
            artefact = compiled(kernel, target)
            now = row(kernel, artefact)
            rows.append(now)
            problems = faults(kernel, artefact)
            if arguments.check:
                before = recorded.get((target, kernel.name))
                problems += ["is not recorded"] if before is None else grown(now, before)
            wrong += [f"{target} {kernel.name}: {problem}" for problem in problems]
            counts = f"{now.get('instructions_per_element', '-'):>6} {now.get('alu_per_element', '-'):>6}"
            print(f"{target:<7} {kernel.name:<44} {artefact.registers:>3} registers {counts}", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))
    if not arguments.check:
        command = "python -m benchmarks.kernel_artefacts"
        result = {"schema": 1, "command": command, "triton": triton.__version__, "environment": environment()}
        write_json(RESULT, result | {"rows": rows})


if __name__ == "__main__":
    main()
