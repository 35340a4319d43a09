"""One small file per architecture: how pre-activations become features."""

from glasshouse.server.dictionaries.architectures.abstopk import AbsTopK
from glasshouse.server.dictionaries.architectures.activation import Activation
from glasshouse.server.dictionaries.architectures.gated import Gated
from glasshouse.server.dictionaries.architectures.groupmax import GroupMax
from glasshouse.server.dictionaries.architectures.jumprelu import BatchTopK, JumpReLU
from glasshouse.server.dictionaries.architectures.standard import ReLU
from glasshouse.server.dictionaries.architectures.topk import TopK

__all__ = ["AbsTopK", "Activation", "BatchTopK", "Gated", "GroupMax", "JumpReLU", "ReLU", "TopK"]
