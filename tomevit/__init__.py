"""Fast vision transformers with native token merging.

import tomevit

model = tomevit.create("vit_b16", r=16)      # eval mode, on the CPU, ready
logits = model(images)                       # (B, 3, 224, 224) normalised -> (B, 1000)
"""

from tomevit.class_names import class_names
from tomevit.classify import classify
from tomevit.config import Card, Config, Preprocess
from tomevit.errors import AmbiguousCheckpointError, CheckpointError, DownloadError, UploadError
from tomevit.factory import create
from tomevit.flops import flops
from tomevit.layers.merge import Merge, Tokens, unmerge
from tomevit.models import DistilledLogits, MaskedAutoencoder, VisionTransformer
from tomevit.optim import param_groups
from tomevit.optimize import optimize
from tomevit.programs import export_program
from tomevit.recipes import Recipe, list_recipes, recipe
from tomevit.transform import transform
from tomevit.weights.convert import convert
from tomevit.weights.export import export
from tomevit.weights.native import load, save
from tomevit.weights.share import push
from tomevit.weights.verify import verify
from tomevit.zoo import card, list_models

__version__ = "0.1.0.dev0"

__all__ = [
    "AmbiguousCheckpointError",
    "Card",
    "CheckpointError",
    "Config",
    "DistilledLogits",
    "DownloadError",
    "MaskedAutoencoder",
    "Merge",
    "Preprocess",
    "Recipe",
    "Tokens",
    "UploadError",
    "VisionTransformer",
    "card",
    "class_names",
    "classify",
    "convert",
    "create",
    "export",
    "export_program",
    "flops",
    "list_models",
    "list_recipes",
    "load",
    "optimize",
    "param_groups",
    "push",
    "recipe",
    "save",
    "transform",
    "unmerge",
    "verify",
]
