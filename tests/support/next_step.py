"""What every reason has in common by which normswap keeps a norm: it ends in what to do next."""

from __future__ import annotations

import re

_VERBS = "add|ask|call|convert|delete|export|give|leave|load|make|pass|prune|remove|repair|run|take|trace|write"
NEXT = re.compile(rf"; (?:to swap it, |if it only normalizes, )?(?:{_VERBS}) [^;]+$")


def says_what_to_do(reason: str) -> bool:
    return NEXT.search(reason) is not None
