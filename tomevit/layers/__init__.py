"""The parts, for use in a transformer of your own: see examples/own_transformer.py."""

from tomevit.layers.attention import Attention, attend
from tomevit.layers.block import Block
from tomevit.layers.embed import PatchEmbed, add_prefix_and_positions
from tomevit.layers.matching import (
    MATCHINGS,
    NEEDS,
    Matching,
    bipartite_soft_matching,
    diffrate_matching,
    every_kth_matching,
    grid_matching,
    importance_matching,
    needs,
    pitome_matching,
    random_matching,
    redundant_matching,
)
from tomevit.layers.merge import Merge, Tokens, compose, merge_mean, merge_tokens, slot_map, unmerge
from tomevit.layers.mlp import DropPath, LayerScale, Mlp
from tomevit.layers.pool import mean_patch
from tomevit.schedule import Step, check_schedule, resolve_schedule, resolve_steps, token_counts

__all__ = [
    "MATCHINGS",
    "NEEDS",
    "Attention",
    "Block",
    "DropPath",
    "LayerScale",
    "Matching",
    "Merge",
    "Mlp",
    "PatchEmbed",
    "Step",
    "Tokens",
    "add_prefix_and_positions",
    "attend",
    "bipartite_soft_matching",
    "check_schedule",
    "compose",
    "diffrate_matching",
    "every_kth_matching",
    "grid_matching",
    "importance_matching",
    "mean_patch",
    "merge_mean",
    "merge_tokens",
    "needs",
    "pitome_matching",
    "random_matching",
    "redundant_matching",
    "resolve_schedule",
    "resolve_steps",
    "slot_map",
    "token_counts",
    "unmerge",
]
