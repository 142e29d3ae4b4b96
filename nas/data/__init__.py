"""Readers: each turns files into uint8 images and integer labels."""
