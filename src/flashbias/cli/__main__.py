"""`python -m flashbias.cli`: the command line where no script is installed."""

from flashbias.cli import main

if __name__ == "__main__":
    main()
