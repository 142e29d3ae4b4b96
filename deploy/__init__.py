"""From a trained network to a file that was run: export, verify, report."""
