"""Where other projects add parts by name, without an edit here.

A registered part is named in a yaml like one of this package's own. What goes together with it is
for its author to know: the rules of combinations.py are about this package's parts.
"""

from detectron2.utils.registry import Registry

QUERIES_REGISTRY = Registry("DETR_QUERIES")
QUERIES_REGISTRY.__doc__ = """
Query initialisers, for `MODEL.DETR.QUERIES`: modules `(memory) -> (Queries, Proposals | None)`, see
queries.py, constructed with `num_queries` and `hidden_dim`.
"""

CROSS_ATTENTION_REGISTRY = Registry("DETR_CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Attention over the memory, for `MODEL.DETR.CROSS_ATTENTION` and `MODEL.DETR.ENCODER_ATTENTION`:
modules `(content, position, memory, reference) -> (B, Q, C)`, see attention.py, constructed with
`hidden_dim`, `num_heads`, `dropout` and `num_levels`, one for each layer.
"""
