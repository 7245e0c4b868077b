"""The architectures, one file each, and `text/`: weights, tokenizers, templates, sampling, generation."""

if __name__ == "models":
    raise ImportError("import tensorgraph.models, not models: this folder is a part of the package tensorgraph")

from tensorgraph.models.architecture import Architecture, Model
from tensorgraph.models.text.model import TextModel, TextSession, load
from tensorgraph.models.text.packaged import find_packaged

__all__ = ["Architecture", "Model", "TextModel", "TextSession", "find_packaged", "load"]
