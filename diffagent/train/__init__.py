"""SFT and RRHF: the two stages of training of arXiv 2404.01342."""

from diffagent import compat

compat.install()  # transformers and trl import torchvision, which may be beside a CPU-only torch
