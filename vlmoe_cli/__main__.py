"""`python -m vlmoe_cli` is `vlmoe`."""

from vlmoe_cli.main import main

if __name__ == "__main__":
    main()
