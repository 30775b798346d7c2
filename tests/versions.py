"""What an older torch cannot do. Tests ask here, and nowhere else, for its version."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Since:
    """True from this version of torch on; ``@feature.required`` skips a test before it."""

    version: str
    why: str

    def __bool__(self) -> bool:
        return torch.__version__ >= self.version

    @property
    def required(self) -> pytest.MarkDecorator:
        return pytest.mark.skipif(not self, reason=f"before torch {self.version} {self.why}")


ANY_BATCH_SIZE = Since("2.10", "export specialises a batch of one")
EXPORT_RESTORES = Since("2.10", "export does not put last_mix back")
COPIES_OF_A_LOSS = Since("2.12", "Dynamo does not trace the copy of a loss that is taken without reduction")
PROPERTIES_OF_A_MIX = Since("2.13", "Dynamo does not trace mix.share, a property of a named tuple")
UNKNOWN_SIZES = Since("2.13", "Dynamo compares sizes that it does not know")
MESSAGES = Since("2.13", "Dynamo does not pass on the message of an error under fullgraph")
FEWEST_LOOPS = Since("2.13", "Inductor writes a loop or two more")
LINEAR_CROSS_ENTROPY = Since("2.13", "there is no nn.LinearCrossEntropyLoss")
