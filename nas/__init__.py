"""Search spaces, supernets, predictors and search."""
