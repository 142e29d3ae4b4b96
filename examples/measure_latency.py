"""Time an ONNX file with ONNX Runtime and nothing of nasctl: one process, one thread, batch 1.

python measure_latency.py model.onnx [CALLS]

Floats are noise, integers 1 to 7. Free sizes are what the file's property "free_sizes" says, or 1.
"""

import json
import sys
import time

import numpy as np
import onnxruntime as ort

KINDS = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8"}
KINDS |= {"tensor(int64)": "i8", "tensor(int32)": "i4", "tensor(int8)": "i1", "tensor(uint8)": "u1"}

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
known = json.loads(session.get_modelmeta().custom_metadata_map.get("free_sizes", "{}"))
rng = np.random.default_rng(0)
feeds = {}
for put in session.get_inputs():
    if put.type not in KINDS:
        sys.exit(f"input {put.name} is a {put.type}; taken are {', '.join(KINDS)}")
    size = [n if isinstance(n, int) else known.get(n, 1) for n in put.shape]
    kind = np.dtype(KINDS[put.type])
    noise = rng.standard_normal(size) if kind.kind == "f" else rng.integers(1, 8, size)
    feeds[put.name] = noise.astype(kind)
times = []
for _ in range(50 + int(sys.argv[2] if len(sys.argv) > 2 else 500)):  # the first 50 warm up
    began = time.perf_counter()
    session.run(None, feeds)
    times.append(1e3 * (time.perf_counter() - began))
p50, p95 = np.percentile(times[50:], [50, 95])
print(json.dumps({"median_ms": p50, "p95_ms": p95}))
