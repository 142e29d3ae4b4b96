"""One file per space: `foo.py` here is `--space foo`. See docs/add_a_space.md."""
