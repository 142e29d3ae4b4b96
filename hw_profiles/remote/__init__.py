"""Measuring on boards: over ssh, or by files that are carried there and back."""
