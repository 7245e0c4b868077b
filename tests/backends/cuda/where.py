"""Which device the tests of CUDA's kernels run on: `cuda-host`, or with TENSORGRAPH_CUDA=cuda a GPU (`make test-cuda`).

As a program it says which that is, or in a sentence what is missing.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.host import HostDevice
from tensorgraph.device import get_devices
from tensorgraph.errors import TensorGraphError

NAME = os.environ.get("TENSORGRAPH_CUDA", "cuda-host")
ON_HOST = NAME == "cuda-host"


def device(memory_bytes: int | None = None) -> CudaDevice:
    """A device of its own, on the host with so much memory."""
    if ON_HOST:
        return HostDevice(NAME, memory_bytes)
    (found,) = get_devices(NAME)
    assert isinstance(found, CudaDevice)
    return found


def main() -> int:
    """The exit code."""
    if missing := [name for name in ("pytest", "xdist", "hypothesis", "gguf") if find_spec(name) is None]:
        print(f"test-cuda: wanted {', '.join(missing)} (pip install 'tensorgraph-runtime[test]')", file=sys.stderr)
        return 1
    try:
        about = device().runtime.describe()
    except TensorGraphError as error:
        print(f"test-cuda: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("test-cuda: " + ", ".join(f"{name} {value}" for name, value in about.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
