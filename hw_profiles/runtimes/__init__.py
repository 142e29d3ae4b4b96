"""One file per runtime: build, load, run. Used by profiling and by deployment alike."""
