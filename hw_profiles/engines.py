"""Building a runtime's own file where it will run, and what there is to say of it.

The same code on this machine (`deploy/engine.py`) and on boards (`hw_profiles/remote/engines.py`):
it needs Python 3.8 and the runtime, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Dict

from hw_profiles import fingerprint, runtimes
from hw_profiles.runtimes import Options
from nas.errors import NasctlError

#: what of a machine an engine depends on; the rest of a fingerprint is for reading
DEPENDS = (
    "processor",
    "design",
    "instructions",
    "architecture",
    "board",
    "l4t",
    "gpu",
    "sm",
    "driver",
    "cuda",
)
GPU = ("tensorrt", "aoti_cuda")  # runtimes whose engines belong to a GPU
#: of /proc/cpuinfo: which design a processor is of, on x86 and on Arm
DESIGN = (("cpu family", "CPU implementer"), ("model", "CPU part"), ("stepping", "CPU revision"))
#: of x86's flags, what compilers choose by; the others also tell of the kernel and its settings
INSTRUCTIONS = re.compile(
    r"(mmx|s?sse|pni|avx|amx|fma|f16c|xop|bmi|abm|tbm|lzcnt|popcnt|movbe|adx|v?aes|v?pclmul|gfni|sha_)"
)

Facts = Dict[str, Any]


def built(
    model: Path,
    path: Path,
    runtime: str,
    precision: str | None,
    threads: int,
    options: Options | None = None,
) -> Facts:
    """Build the engine of an ONNX file at `path`, whole or not at all; returns which version built
    it for which machine, what goes in and out and what it computes in, by the side-car's names.
    `options` are for TensorRT alone.

    Raises NasctlError where the runtime is not here or cannot build it, and where the engine
    computes in another precision than asked for.
    """
    module = runtimes.compiled(runtime)
    if missing := module.unavailable():
        raise NasctlError(missing, where=f"runtime {runtime}")
    asked: dict[str, Any] = {} if options is None else {"options": options}
    module.build(model, path, threads=threads, precision=precision, **asked)
    options = options or Options()
    said = {
        "compatible": list(options.compatible),
        "shapes": {name: [list(one) for one in each] for name, each in options.shapes.items()},
    }
    if options.compatible:  # the side-car's first words: loading it depends on them
        beside(path).write_text(json.dumps(said), encoding="utf-8")
    # ONNX Runtime's own format cannot be looked into, so it is the same graph that is asked
    source = model if runtime == "onnxruntime" else path
    try:
        session = module.load(source, threads=threads, precision=precision)
        observed = module.observed_precision(session)
    except NasctlError:
        path.unlink()
        if options.compatible:
            beside(path).unlink()
        raise
    return {
        "runtime": runtime,
        "version": module.version(),
        "requested": precision,
        "observed": observed,
        "threads": threads,
        "inputs": {name: list(shape) for name, shape in session.inputs.items()},
        "outputs": list(session.outputs),
        "machine": machine(runtime),
        **said,
    }


def beside(path: Path) -> Path:
    """The place of an engine's side-car."""
    return path.with_name(f"{path.name}.json")


def machine(runtime: str) -> dict[str, str]:
    """What an engine of that runtime depends on besides the library."""
    found = {**fingerprint.fingerprint(runtime), **processor()}
    said = {name: str(found[name]) for name in DEPENDS if found.get(name) not in (None, "?")}
    if runtime in GPU:
        from hw_profiles.runtimes import _cuda

        gpu = _cuda.gpu()
        more = {"gpu": gpu.name, "sm": str(gpu.capability), "driver": str(gpu.driver_version)}
        said.update(more)
    return said


def processor(root: Path = Path("/")) -> dict[str, str]:
    """What tells processors of one name apart, "?" where nothing does: virtual ones are called the
    same in generations with and without AVX-512. `root` is for tests."""
    path = root / "proc/cpuinfo"
    design = [fingerprint.field(path, *names) for names in DESIGN]
    flags = fingerprint.field(path, "flags").split()
    known = [flag for flag in flags if INSTRUCTIONS.match(flag)]
    text = " ".join(sorted(known or fingerprint.field(path, "Features").split()))
    return {
        "design": "?" if design == ["?"] * 3 else "/".join(design),
        "instructions": "?" if text == "?" else hashlib.sha256(text.encode()).hexdigest()[:12],
    }
