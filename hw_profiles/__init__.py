"""Devices, operators, latency tables and measurement: ops in, milliseconds out.

Knows nothing of search spaces or tasks; imports without torch.
"""
