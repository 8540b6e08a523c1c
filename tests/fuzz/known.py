"""Failures that are known and not mended yet: counted, but no end of a run. Whoever mends one removes it."""

import re
from typing import NamedTuple

from tests.fuzz.call import Call


class Known(NamedTuple):
    what: str
    call: str  # a pattern in the script
    failure: str  # a pattern in the message


KNOWN: tuple[Known, ...] = ()


def known(call: Call, failure: Exception) -> str | None:
    """What is known about a failure."""
    for one in KNOWN:
        if re.search(one.call, call.script, re.DOTALL) and re.search(one.failure, str(failure)):
            return one.what
    return None
