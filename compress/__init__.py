"""Pruning (distillation and quantization: none yet; see the CHANGELOG)."""
