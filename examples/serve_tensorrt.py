"""Serve a bundle's TensorRT engine with NVIDIA's library and nothing of nasctl. Never run so far.

python serve_tensorrt.py BUNDLE ENGINE images.npy     (uint8 [N, C, H, W], in the engine's size)

Build the engine on the board (`nasctl build BUNDLE --engine tensorrt`, or the trtexec line of
`--commands`). Needs tensorrt, numpy and torch, which here only holds the buffers on the GPU.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import tensorrt as trt
import torch

folder, images = Path(sys.argv[1]), np.load(sys.argv[3])
task = json.loads((folder / "task.json").read_text())
runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
car = Path(f"{sys.argv[2]}.json")  # what `nasctl build` said of the engine
# one that runs in later versions (--compatible version) brings native code of its own
said = json.loads(car.read_text()) if car.is_file() else {}
runtime.engine_host_code_allowed = "version" in said.get("compatible", [])
engine = runtime.deserialize_cuda_engine(Path(sys.argv[2]).read_bytes())
if engine is None:
    sys.exit("not an engine for this GPU and this version of TensorRT")
context, stream = engine.create_execution_context(), torch.cuda.Stream()
context.set_input_shape(task["input"], (1, *task["shape"]))
buffers = {}
for at in range(engine.num_io_tensors):
    name = engine.get_tensor_name(at)
    buffers[name] = torch.zeros(tuple(context.get_tensor_shape(name)), device="cuda")  # float32
    context.set_tensor_address(name, buffers[name].data_ptr())
mean, std = (np.array(task[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
answers, times = [], []
for image in images:
    began = time.perf_counter()
    x = ((image / np.float32(255) - mean) / std)[None].astype(np.float32)
    with torch.cuda.stream(stream):
        buffers[task["input"]].copy_(torch.from_numpy(x))
        if not context.execute_async_v3(stream.cuda_stream):
            sys.exit("TensorRT could not run it")
        answers.append({name: buffers[name].tolist()[0] for name in task["outputs"]})
    times.append(1e3 * (time.perf_counter() - began))
p50, p95 = np.percentile(times, [50, 95])
print(json.dumps({"answers": answers, "median_ms": p50, "p95_ms": p95}))
