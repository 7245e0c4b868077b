"""The command line, one command a file."""

if __name__ == "tools":
    raise ImportError("import tensorgraph.tools, not tools: this folder is a part of the package tensorgraph")
