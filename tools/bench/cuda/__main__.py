"""The program."""

from tensorgraph.tools.bench.cuda.command import main

if __name__ == "__main__":
    main()
