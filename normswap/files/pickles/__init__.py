"""Read a pickle without letting it run anything: review what it would do, then let torch's weights-only unpickler do exactly that.

A pickle is a program. It is first executed symbolically (`interpreter`): the opcodes of torch's weights-only unpickler, and no others, push
descriptions where the real thing would push objects. Then every object that it would make is reviewed (`review`), before one is made:

* a class may be instantiated only as `object.__new__(cls)` plus a dict of attributes - constructors never run - and only if it is
  an nn.Module of a reviewed place in a well-known package (or of a package that the user trusts), or one of OBJECTS (`allowed`);
* a function may be called only if it is one of CALLS, each with a check of its arguments;
* what may lie about as a value, where a later forward could call it, is tensors, plain data, reviewed objects and the pure
  functions FUNCTIONS, or a functools.partial of those; hooks, and attributes that shadow a method, are refused.

Nothing is imported before all names have passed, and then only from the reviewed places. The review comes when the program has
ended, because it may fill a dict after it has handed it to somebody: contents only grow, so what holds at the end held throughout.
Then torch reads the file (`read`), with the model in the place of what wrapped it in training (`wrappers`). May import `models`.
"""
