"""The libraries that tomevit is compared with: `from benchmarks.peers import timm, torchvision`."""

import sys
from unittest import mock

try:
    import torchvision
except RuntimeError:
    # PyPI's torchvision is built for a CUDA torch. Beside a CPU one its compiled operators do not load, and describing
    # them to torch raises. The models and the transforms need none of them, so import without the descriptions.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    with mock.patch("torch.library.register_fake", return_value=lambda function: function):
        import torchvision

import timm

__all__ = ["timm", "torchvision"]
