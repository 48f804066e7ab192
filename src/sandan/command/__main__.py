"""Start the command `sandan` with `python -m sandan.command`, as the Makefile does."""

from .main import main


if __name__ == "__main__":
    main()
