"""`python -m normswap` is `normswap`."""

from normswap.cli.app import main

if __name__ == "__main__":
    main()
