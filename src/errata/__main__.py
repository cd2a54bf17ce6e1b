"""`python -m errata` is the `errata` command."""

from errata.cli.app import main

if __name__ == "__main__":
    main()
