"""``python -m decal`` is the command ``decal``."""

from decal.eval.cli import main

if __name__ == "__main__":
    main()
