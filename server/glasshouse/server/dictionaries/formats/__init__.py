"""One file per format on disk. `FORMATS` is in the order in which they are tried: the most telling names
first.
"""

from glasshouse.server.dictionaries.formats import (
    bussmann,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_multi,
    glasshouse,
    goodfire,
    kissane,
    llama_scope,
    lm_saes,
    openai,
    qwen_scope,
    saelens,
    science_of_finetuning,
    sparsify,
)
from glasshouse.server.dictionaries.formats.format import Format

FORMATS: tuple[Format, ...] = (
    glasshouse.FORMAT,
    saelens.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    bussmann.FORMAT,
    lm_saes.FORMAT,
    llama_scope.FORMAT,
    gemma_scope_2_multi.FORMAT,
    gemma_scope_2.FORMAT,
    circuit_tracer.CLT_FORMAT,
    circuit_tracer.SET_FORMAT,
    qwen_scope.FORMAT,
    gemma_scope.FORMAT,
    openai.FORMAT,
    goodfire.FORMAT,
    kissane.FORMAT,
    science_of_finetuning.FORMAT,
)

__all__ = ["FORMATS", "Format"]
