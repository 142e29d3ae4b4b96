"""`python -m tests.often ...` is nasctl that saves a training's state twice a second."""

from cli import main
from nas import supernet

if __name__ == "__main__":
    assert supernet.train.__kwdefaults__["save_every_s"] > 1
    supernet.train.__kwdefaults__["save_every_s"] = 0.5
    main.main()
