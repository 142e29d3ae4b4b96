"""TensorRT's Python names over ONNX Runtime, for tests: an "engine" is the ONNX file itself.

It shows that our calls fit together, nothing about TensorRT. That every name here is one of the
real library, in 10.x and 11.x, is checked by tests/test_tensorrt_names.py.
"""

from __future__ import annotations

import ctypes
import json
import os
from enum import Enum, IntEnum

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import load_external_data_for_model

__version__ = "11.4.0"


class LayerInformationFormat(Enum):
    JSON = 1


class MemoryPoolType(Enum):
    WORKSPACE = 0


class ProfilingVerbosity(Enum):
    DETAILED = 2


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class BuilderFlag(Enum):
    TF32 = 7
    VERSION_COMPATIBLE = 14


class HardwareCompatibilityLevel(Enum):
    NONE = 0
    AMPERE_PLUS = 1


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self):
        pass


def nptype(dtype):
    return np.dtype(dtype).type


class Tensor:
    def __init__(self, value):
        self.name = value.name
        self.shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)


class Network:
    def __init__(self):
        self.model = None

    @property
    def num_inputs(self):
        return len(self.model.graph.input)

    def get_input(self, at):
        return Tensor(self.model.graph.input[at])


class Builder:
    max_threads = 0

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self):
        return BuilderConfig()

    def create_optimization_profile(self):
        return OptimizationProfile()

    def build_serialized_network(self, network, config):
        assert config.profiling_verbosity is ProfilingVerbosity.DETAILED
        if config.profile.shapes.keys() != {value.name for value in network.model.graph.input}:
            self.logger.log(ILogger.ERROR, "an input has no shapes")
            return None
        if config.cache:
            config.cache.content += b"timed;"
        onnx.helper.set_model_props(
            network.model,
            {
                "profile": json.dumps(config.profile.shapes),
                "flags": ",".join(flag.name for flag in config.flags),
                "level": config.hardware_compatibility_level.name,
            },
        )
        return network.model.SerializeToString()


class OptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, best, high):
        assert len(low) == len(best) == len(high)
        self.shapes[name] = low, best, high


class BuilderConfig:
    profiling_verbosity = None
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def __init__(self):
        self.flags, self.cache = [], None

    def set_flag(self, flag):
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool, size):
        assert size > 1 << 20

    def clear_flag(self, flag):
        assert flag is BuilderFlag.TF32

    def add_optimization_profile(self, profile):
        self.profile = profile

    def create_timing_cache(self, content):
        return TimingCache(content) if content != b"damaged" else None

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return cache.content != b"of another GPU"

    def get_timing_cache(self):
        return self.cache


class TimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return memoryview(self.content)


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.errors = network, []

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, at):
        return self.errors[at]

    def parse(self, content, path=None):
        try:
            self.network.model = onnx.load_from_string(content)
            if path:  # else weights in other files are not found
                load_external_data_for_model(self.network.model, os.path.dirname(path))
            return bool(self.network.model.graph.node)
        except Exception as error:  # as the library, whose parser never raises
            self.errors.append(ParserError(str(error)))
            return False


class ParserError:
    def __init__(self, text):
        self.text = text

    def desc(self):
        return self.text


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        model = onnx.ModelProto()
        try:
            model.ParseFromString(plan)
            if "VERSION" in CudaEngine(model).said["flags"] and not self.engine_host_code_allowed:
                self.logger.log(ILogger.ERROR, "host code is not allowed")
                return None
            return CudaEngine(model)
        except Exception:
            self.logger.log(ILogger.ERROR, "magic tag does not match")
            return None


class CudaEngine:
    def __init__(self, model):
        self.model = model
        self.said = {each.key: each.value for each in model.metadata_props}
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, at):
        return [*self.inputs, *self.outputs][at]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        shape = (self.inputs | self.outputs)[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in json.loads(self.said["profile"])[name]]

    def get_tensor_dtype(self, name):
        return {"tensor(float)": "float32"}[(self.inputs | self.outputs)[name].type]

    def create_execution_context(self):
        return ExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)


class ExecutionContext:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        shape = self.shapes.get(name, self.engine.get_tensor_shape(name))
        return tuple(1 if size == -1 else size for size in shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream
        engine = self.engine
        found = engine.session.run(None, {name: self.view(name) for name in engine.inputs})
        for name, value in zip(engine.outputs, found, strict=True):
            self.view(name)[...] = value
        return True

    def view(self, name):
        shape = self.get_tensor_shape(name)
        kind = ctypes.c_float * int(np.prod(shape))
        return np.ctypeslib.as_array(kind.from_address(self.addresses[name])).reshape(shape)


class EngineInspector:
    def __init__(self, engine):
        self.engine = engine

    def get_engine_information(self, layout):
        assert layout is LayerInformationFormat.JSON
        types = {weight.data_type for weight in self.engine.model.graph.initializer}
        halves = {onnx.TensorProto.FLOAT16: "Half", onnx.TensorProto.BFLOAT16: "BFloat16"}
        kind = next((halves[type] for type in types if type in halves), "Float")
        layers = [
            {"LayerType": node.op_type, "Inputs": [{"DataType": kind}]}
            for node in self.engine.model.graph.node
        ]
        return json.dumps({"Layers": layers})
