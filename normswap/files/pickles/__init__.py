"""Read a pickle without letting it run anything: review what it would do, then let torch's weights-only unpickler do exactly that.

A pickle is a program. It is first executed symbolically: the opcodes of torch's weights-only unpickler, and no others, push
descriptions where the real thing would push objects. Then every object that it would make is judged, before one is made:

* a class may be instantiated only as `object.__new__(cls)` plus a dict of attributes - constructors never run - and only if it is
  an nn.Module of a reviewed place in a well-known package (or of a package that the user trusts), or one of OBJECTS;
* a function may be called only if it is one of CALLS, each with a check of its arguments;
* what may lie about as a value, where a later forward could call it, is tensors, plain data, reviewed objects and the pure
  functions FUNCTIONS, or a functools.partial of those; hooks, and attributes that shadow a method, are refused.

Nothing is imported before all names have passed, and then only from the reviewed places. Judging happens when the program has
ended, because it may fill a dict after it has handed it to somebody: contents only grow, so what holds at the end held throughout.

descriptions   what is pushed in the place of real things
interpreter    what happens, without a thought to whether it may
reviewed       the places, classes and functions that passed a review
calls          the functions that may be called, each with the check of its arguments
judge          whether it may happen
wrappers       what stands for nn.DataParallel and its like, which are read as the model inside
files          the two forms of file, and torch's own unpickler at the end
messages       what is said of a file that is not read
"""

from __future__ import annotations

from normswap.files.pickles.messages import mismatched_torchvision
from normswap.files.pickles.read import open_archive, read
from normswap.files.pickles.wrappers import stand_in, unwrapped

__all__ = ["mismatched_torchvision", "open_archive", "read", "review", "stand_in", "unwrapped"]
