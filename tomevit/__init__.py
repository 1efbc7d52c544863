"""Fast vision transformers with native token merging.

import tomevit

model = tomevit.create("vit_b16", r=16)      # eval mode, on the CPU, ready
logits = model(images)                       # (B, 3, 224, 224) normalised -> (B, 1000)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# These two have the names of modules, whose first import by anyone would put the module in their place.
from tomevit.subject import flops as flops
from tomevit.transform import transform as transform
from tomevit.version import __version__ as __version__

if TYPE_CHECKING:
    from tomevit.cards import Card as Card
    from tomevit.config import Config as Config
    from tomevit.config import Preprocess as Preprocess
    from tomevit.config import Preset as Preset
    from tomevit.data.class_names import class_names as class_names
    from tomevit.deploy.optimize import optimize as optimize
    from tomevit.deploy.programs import export_program as export_program
    from tomevit.errors import AmbiguousCheckpointError as AmbiguousCheckpointError
    from tomevit.errors import CheckpointError as CheckpointError
    from tomevit.errors import DownloadError as DownloadError
    from tomevit.errors import UploadError as UploadError
    from tomevit.factory import create as create
    from tomevit.factory import from_module as from_module
    from tomevit.layers.merge import Merge as Merge
    from tomevit.layers.merge import Tokens as Tokens
    from tomevit.layers.merge import unmerge as unmerge
    from tomevit.models import DistilledLogits as DistilledLogits
    from tomevit.models import MaskedAutoencoder as MaskedAutoencoder
    from tomevit.models import VisionTransformer as VisionTransformer
    from tomevit.tasks.classify import classify as classify
    from tomevit.tasks.tune import Front as Front
    from tomevit.tasks.tune import tune as tune
    from tomevit.tasks.visualize import visualize as visualize
    from tomevit.training.parameter_groups import param_groups as param_groups
    from tomevit.training.recipes import Recipe as Recipe
    from tomevit.training.recipes import list_recipes as list_recipes
    from tomevit.training.recipes import recipe as recipe
    from tomevit.weights.checkpoint import load as load
    from tomevit.weights.checkpoint import save as save
    from tomevit.weights.convert import convert as convert
    from tomevit.weights.export import export as export
    from tomevit.weights.push import push as push
    from tomevit.weights.verify import verify as verify
    from tomevit.zoo import card as card
    from tomevit.zoo import list_models as list_models

# The other public names, and the modules that are imported on their first use: torch comes with most.
_MODULES = {
    "AmbiguousCheckpointError": "errors",
    "Card": "cards",
    "CheckpointError": "errors",
    "Config": "config",
    "DistilledLogits": "models",
    "DownloadError": "errors",
    "Front": "tasks.tune",
    "MaskedAutoencoder": "models",
    "Merge": "layers.merge",
    "Preprocess": "config",
    "Preset": "config",
    "Recipe": "training.recipes",
    "Tokens": "layers.merge",
    "UploadError": "errors",
    "VisionTransformer": "models",
    "card": "zoo",
    "class_names": "data.class_names",
    "classify": "tasks.classify",
    "convert": "weights.convert",
    "create": "factory",
    "export": "weights.export",
    "export_program": "deploy.programs",
    "from_module": "factory",
    "list_models": "zoo",
    "list_recipes": "training.recipes",
    "load": "weights.checkpoint",
    "optimize": "deploy.optimize",
    "param_groups": "training.parameter_groups",
    "push": "weights.push",
    "recipe": "training.recipes",
    "save": "weights.checkpoint",
    "tune": "tasks.tune",
    "unmerge": "layers.merge",
    "verify": "weights.verify",
    "visualize": "tasks.visualize",
}

__all__ = sorted([*_MODULES, "flops", "transform"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
