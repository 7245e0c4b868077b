"""The program."""

from tensorgraph.tools.bench.cuda.command import main

main()
