"""Every family of the installed transformers: its expert modules are found and pass the trial, or are others."""

from pathlib import Path

import transformers.models
from torch import nn

from lightning_eplb.parallel.discovery import find_experts
from lightning_eplb.parallel.protocol_check import find_deviation
from tests.parallel.test_parallelize import experts_of

OTHERS = {
    "dbrx": "its config is nested, ours here is not",
    "inkling": "shared experts, which every token visits",
    "jetmoe": "layers that take the number of tokens of each expert",
    "llama4": "all experts compute all tokens",
    "longcat_flash": "identity experts among the experts",
}


def test_families_of_transformers_are_found_or_known() -> None:
    found, missed = [], []
    for folder in sorted(Path(transformers.models.__path__[0]).iterdir()):
        source = folder / f"modeling_{folder.name}.py"
        if source.exists() and "Experts(nn.Module)" in source.read_text():
            try:
                modules = experts_of(folder.name)
            except (AttributeError, TypeError):
                modules = []
            for module in modules:
                if any(find_experts(nn.ModuleDict({"experts": module}))):
                    found.append(folder.name)
                    assert find_deviation(module) is None, folder.name
            if folder.name not in found:
                missed.append(folder.name)
    assert set(missed) <= set(OTHERS)
    assert len(found) > 50
