"""Every TensorRT name that our file uses is one of the real library: of 10.3 (JetPack 6), of the
latest 10.x and of 11.x.

TensorRT's own libraries cannot be had from PyPI, its Python bindings can. They import once the
missing libraries are replaced by empty ones, and then show every class, method and signature;
calling anything would crash. So the names are held against them, not the behaviour.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pretend_tensorrt
import pytest

ROOT = Path(__file__).parents[1]
#: our runtime, and the example that serves an engine
SOURCES = (ROOT / "hw_profiles/runtimes/tensorrt.py", ROOT / "examples/serve_tensorrt.py")
VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
#: what each variable of our file is; a variable that is not named here or below fails a test
IS = {
    "trt": "",
    "trt.ILogger": "ILogger",
    "_library()": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser.get_error(at)": "ParserError",
    "config": "IBuilderConfig",
    "config.get_timing_cache()": "ITimingCache",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "trt.Logger": "Logger",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "session.inner.engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "self.context": "IExecutionContext",
}
ENUMS = (
    "NetworkDefinitionCreationFlag",
    "MemoryPoolType",
    "ProfilingVerbosity",
    "BuilderFlag",
    "TensorIOMode",
    "LayerInformationFormat",
    "HardwareCompatibilityLevel",
)
IS |= {f"trt.{name}": name for name in ENUMS}
#: of other libraries and our own
OTHERS = """_cuda arrays buffers contextlib counts feeds first folder functools gpu importlib json
known layer loaded log model np options os path plan said self session shapes tempfile value whole
WORDS answers car image images stream sys task time times torch"""
DUMP = """
import json, sys
import tensorrt_bindings as trt
classes = {name: thing for name, thing in vars(trt).items() if isinstance(thing, type)}
found = {name: {part: getattr(getattr(thing, part), "__doc__", None) or "" for part in dir(thing)}
         for name, thing in {"": trt, **classes}.items()}
print(json.dumps(found))
"""


def root(node):
    """The variable that an expression begins with; nothing for literals and plain calls."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def used():
    """(class, attribute, number of arguments or None) of every use."""
    for source in SOURCES:
        yield from used_in(ast.parse(source.read_text()))


def used_in(tree):
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        base, call = ast.unparse(node.value), calls.get(node)
        if base in IS:
            assert not (call and call.keywords), "keywords are not compared"
            yield IS[base], node.attr, len(call.args) if call else None
        else:
            assert root(node.value) in ["", *OTHERS.split()], f"what is {base} (.{node.attr})?"


def signatures(doc, name):
    """(least, most positional arguments without self) of each overload in a pybind docstring."""
    for line in doc.splitlines():
        if match := re.match(rf"(?:\d+\. )?{name}\((.*)\) ->", line):
            text = match[1]
            while (shorter := re.sub(r"\[[^\[\]]*\]|\([^()]*\)|<[^<>]*>", "", text)) != text:
                text = shorter
            parts = [part for part in text.split(", ") if part and not part.startswith("self")]
            yield sum("=" not in part for part in parts), len(parts)


def run(*words, **more):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)


def empty_libraries(bindings, folder):
    """For every library that the bindings need and this machine lacks, one with their names."""
    needed = run("readelf", "-d", bindings, check=True).stdout
    undefined = run("nm", "-D", "--undefined-only", bindings, check=True).stdout
    names = re.findall(r" U (\w+)$", undefined, re.MULTILINE)  # versioned names are the system's
    ours = [name for name in names if not name.startswith(("Py", "_Py", "_Z", "dl"))]
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ours))
    for library in re.findall(r"\[(libnv\w+\.so[\d.]*)\]", needed):
        run("gcc", "-shared", "-fPIC", "-w", "-o", folder / library, source, check=True)


@pytest.fixture(scope="module", params=VERSIONS)
def real(request, tmp_path_factory):
    """{class: {attribute: docstring}} of a version's bindings; "" is the module."""
    missing = [tool for tool in ("gcc", "readelf", "nm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp(request.param)
    wanted = f"{VERSIONS[request.param]}=={request.param}"
    words = ("-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", folder, wanted)
    if run(sys.executable, *words).returncode:
        pytest.skip(f"cannot download {wanted}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    empty_libraries(folder / "tensorrt_bindings" / "tensorrt.so", folder)
    where = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    done = run(sys.executable, "-c", DUMP, env=where)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_use_is_of_a_known_thing():
    names = {(thing, name) for thing, name, _ in used()}
    assert len(names) > 40
    assert {("Builder", "build_serialized_network"), ("ICudaEngine", "get_tensor_mode")} <= names


@pytest.mark.slow
def test_every_name_and_signature_is_in_this_version(real):
    for thing, name, arguments in used():
        assert name in real[thing], f"{thing}.{name}"
        if arguments is None or not thing:  # no call, or a class or plain function
            continue
        counts = list(signatures(real[thing][name], name))
        assert any(least <= arguments <= most for least, most in counts), f"{thing}.{name}"


@pytest.mark.slow
def test_the_comparison_would_notice(real):
    assert "execute_async_v9" not in real["IExecutionContext"]
    assert list(signatures(real["IBuilderConfig"]["set_timing_cache"], "set_timing_cache")) == [
        (2, 2)
    ]


@pytest.mark.slow
def test_the_pretended_tensorrt_has_no_names_of_its_own(real):
    called = {
        "Tensor": "ITensor",
        "Network": "INetworkDefinition",
        "BuilderConfig": "IBuilderConfig",
        "OptimizationProfile": "IOptimizationProfile",
        "TimingCache": "ITimingCache",
        "CudaEngine": "ICudaEngine",
        "ExecutionContext": "IExecutionContext",
    }
    for name, thing in vars(pretend_tensorrt).items():
        if not inspect.isclass(thing) or thing.__module__ != "pretend_tensorrt":
            continue
        theirs = real[called.get(name, name)]
        own = {part for part in vars(thing) if not part.startswith("_")}
        assert own - theirs.keys() <= {"view"}, name  # a part of its workings
