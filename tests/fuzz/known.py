"""Failures that are known and not mended yet: counted, but no end of a run. Whoever mends one removes it."""

import re
from typing import NamedTuple

from tests.fuzz.call import Call


class Known(NamedTuple):
    what: str
    call: str  # a pattern in the script
    failure: str  # a pattern in the message


KNOWN = (
    Known("sparse tensors are not refused by name", r"\.to_sparse\(\)\)\n.*refuses\('flash", ""),
    Known("return_attn_probs, return_softmax_lse may be anything", r"dict\(return_\w+=.*refuses", "takes it"),
    Known(
        "packed functions blame q, k and v, cu_seqlens_q or max_seqlen",
        r"refuses\('flash_attn_(varlen_)?(qkv|kv)packed_func'",
        "does not tell (q?kv|cu_seqlens|max_seqlen)|unsupported scalarType",
    ),
    Known(
        "an error does not tell which input requires a gradient",
        "requires_grad_.*refuses",
        "no gradient, but",
    ),
    Known(
        "rotary tables that require a gradient are taken",
        r"rotary_.*requires_grad_.*refuses",
        "takes it|inplace",
    ),
    Known(
        "out is not refused that overlaps itself, k or v",
        r"dict\(out=(out\[:1\]|arg).*refuses",
        "takes it|single memory",
    ),
    Known("S_dmask: keys of a sequence without queries do not count", "dropout_p=", "S_dmask has shape"),
)


def known(call: Call, failure: Exception) -> str | None:
    """What is known about a failure."""
    for one in KNOWN:
        if re.search(one.call, call.script, re.DOTALL) and re.search(one.failure, str(failure)):
            return one.what
    return None
