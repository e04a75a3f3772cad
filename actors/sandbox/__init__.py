"""Runs code nobody trusts and says what it returned. Ray-free; see `sandbox.Sandbox`.

Three kinds of process, and what each may know:

    sandbox.py   the caller's process. Holds the right answers and the nonce, reads plain data only.
    zygote.py    a warm, minimal interpreter behind namespaces that does nothing but fork. Holds no secret.
    harness.py   the forked children. A *program* child runs the code under test and sees the inputs of its
                 calls; a *checker* child runs a task's test script and reaches the program by messages only.

`isolation.py` is what a child goes through before it may read any code; `wire.py` is the framing and `values.py`
the plain-data codec they speak. The last four import nothing but the standard library, because the zygote's
interpreter has nothing else.
"""
