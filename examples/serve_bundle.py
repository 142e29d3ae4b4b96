"""Serve a bundle with ONNX Runtime and nothing of nasctl: classify images, time each call.

python serve_bundle.py BUNDLE images.npy     (uint8 [N, C, H, W], in the size that the file wants)
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

folder, images = Path(sys.argv[1]), np.load(sys.argv[2])
task = json.loads((folder / "task.json").read_text())
options = ort.SessionOptions()
options.intra_op_num_threads = 1
model = folder / json.loads((folder / "bundle.json").read_text())["model"]
session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
mean, std = (np.array(task[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
labels, times = [], []
for image in images:
    began = time.perf_counter()
    x = ((image / np.float32(255) - mean) / std)[None].astype(np.float32)
    (logits,) = session.run(task["outputs"], {task["input"]: x})
    times.append(1e3 * (time.perf_counter() - began))
    labels.append(task["classes"][int(logits.argmax())])
p50, p95 = np.percentile(times, [50, 95])
print(json.dumps({"labels": labels, "median_ms": p50, "p95_ms": p95}))
