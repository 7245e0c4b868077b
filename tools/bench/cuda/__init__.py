"""`python -m tensorgraph.tools.bench.cuda`: what a GPU can do, what kernels reach of it, and models made in its memory."""
