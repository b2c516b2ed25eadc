"""Adapters: injection through PEFT, saving, loading, merging."""

from peftlab.adapters.adapter_files import (
    ADAPTER_FILES,
    add_adapter,
    brought_parameters,
    check_adapter_files,
    load_adapter,
    made_for,
    save_adapter,
)
from peftlab.adapters.beside import FOLDER_BESIDE, Beside, beside, folders_beside, refuse_beside, without_adapter
from peftlab.adapters.configuration import check_adapter
from peftlab.adapters.continuing import check_same_adapter, continue_from
from peftlab.adapters.full import (
    WEIGHTS_FILE,
    load_state,
    load_trained,
    save_state,
    save_trained,
    state_files,
    train_all,
)
from peftlab.adapters.head import HeadLoss, head_input, head_reason
from peftlab.adapters.initial import InitialRows, changes_weights
from peftlab.adapters.inject import (
    AdapterReport,
    adapted_modules,
    base_name,
    inject,
    report,
    token_modules,
    try_injection,
)
from peftlab.adapters.parameters import experts_text, owners, planned_parameters
from peftlab.adapters.patterns import Pattern, rate_factors
from peftlab.adapters.places import idle_towers, new_modules, planned_modules
from peftlab.adapters.reach import reach_notes
from peftlab.adapters.schedule import after_step, penalty
from peftlab.adapters.sizes import fitting_sizes
from peftlab.adapters.state import changed_buffers, kept_buffers, method_of, move_statistics, train_mode
from peftlab.adapters.target_modules import is_convolution, is_grouped

__all__ = [
    "ADAPTER_FILES",
    "AdapterReport",
    "Beside",
    "FOLDER_BESIDE",
    "HeadLoss",
    "InitialRows",
    "Pattern",
    "WEIGHTS_FILE",
    "adapted_modules",
    "add_adapter",
    "after_step",
    "base_name",
    "beside",
    "brought_parameters",
    "changed_buffers",
    "changes_weights",
    "check_adapter",
    "check_adapter_files",
    "check_same_adapter",
    "continue_from",
    "experts_text",
    "fitting_sizes",
    "folders_beside",
    "head_input",
    "head_reason",
    "idle_towers",
    "inject",
    "is_convolution",
    "is_grouped",
    "kept_buffers",
    "load_adapter",
    "load_state",
    "load_trained",
    "made_for",
    "method_of",
    "move_statistics",
    "new_modules",
    "penalty",
    "owners",
    "planned_modules",
    "planned_parameters",
    "rate_factors",
    "reach_notes",
    "refuse_beside",
    "report",
    "save_adapter",
    "save_state",
    "save_trained",
    "state_files",
    "token_modules",
    "train_all",
    "train_mode",
    "without_adapter",
    "try_injection",
]
