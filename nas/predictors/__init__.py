"""One file per predictor: learned ones give `fit`, training-free ones give `score`."""
