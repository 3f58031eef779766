"""Reads a pickle without letting it run code: reviews what it would do, then lets torch's weights-only unpickler do exactly that.

A pickle is a program. It is first executed symbolically (`interpreter`): the opcodes of torch's weights-only unpickler, and no others, push
descriptions where the real thing would push objects. Then every object that it would make is reviewed (`review`), before one is made:

* a class may be instantiated only as `object.__new__(cls)` plus a dict of attributes - constructors never run - and only if it is
  an nn.Module of a reviewed place in a well-known package (or of a package that the user trusts), or one of OBJECTS (`allowed`);
* a function may be called only if it is one of CALLS, each with a check of its arguments;
* a value, which a later forward could call, may only be a tensor, plain data, a reviewed object, one of the pure functions FUNCTIONS
  or a functools.partial of one; hooks, and attributes that shadow a method, are refused.

Nothing is imported before all names have passed, and then only from the reviewed places. The review starts when the program has
ended, because the program may fill a dict after it has used it: contents only grow, so what holds at the end held throughout.
Then torch reads the file (`read`), and the model takes the place of its DataParallel or other wrapper (`wrappers`). May import `models`.
"""
