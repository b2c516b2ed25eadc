"""Bottleneck adapters (Houlsby, Pfeiffer, parallel), which PEFT does not have."""

from peftlab.adapters.bottleneck.config import STYLES, BottleneckConfig, Style
from peftlab.adapters.bottleneck.files import (
    bottleneck_state,
    load_bottleneck_state,
    load_bottlenecks,
    save_bottlenecks,
    write_config,
)
from peftlab.adapters.bottleneck.layer import Bottleneck, BottleneckLayer
from peftlab.adapters.bottleneck.model import BottleneckModel, add_bottlenecks, bottleneck_places
from peftlab.adapters.bottleneck.places import check_blocks, find_blocks
from peftlab.adapters.bottleneck.trace import Block, Place

__all__ = [
    "STYLES",
    "Block",
    "Bottleneck",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "Place",
    "Style",
    "add_bottlenecks",
    "bottleneck_places",
    "bottleneck_state",
    "check_blocks",
    "find_blocks",
    "load_bottleneck_state",
    "load_bottlenecks",
    "save_bottlenecks",
    "write_config",
]
