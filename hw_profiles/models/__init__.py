"""What is learned from measurements: whole networks, single kernels, other devices."""
