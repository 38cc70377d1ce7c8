"""`python -m society` is the command `society`."""

from society.cli import main

if __name__ == "__main__":
    main()
