"""Time an ONNX file with ONNX Runtime and nothing of nasctl: one process, one thread, batch 1.

python measure_latency.py model.onnx [CALLS]
"""

import json
import sys
import time

import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
rng = np.random.default_rng(0)
sizes = {
    put.name: [n if isinstance(n, int) else 1 for n in put.shape] for put in session.get_inputs()
}
feeds = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
times = []
for _ in range(50 + int(sys.argv[2] if len(sys.argv) > 2 else 500)):  # the first 50 warm up
    began = time.perf_counter()
    session.run(None, feeds)
    times.append(1e3 * (time.perf_counter() - began))
p50, p95 = np.percentile(times[50:], [50, 95])
print(json.dumps({"median_ms": p50, "p95_ms": p95}))
