"""The process behind ``library.Child``: reads calls from stdin and answers on stdout."""

import ctypes
import os
import sys

import numpy as np

from .library import Native, read, write


def restore(value):
    if isinstance(value, np.ndarray):
        return np.array(value, order="C")  # memory of its own, with the sanitizer's red zones around it
    if isinstance(value, tuple) and value and value[0] == "ctypes":
        return getattr(ctypes, value[1])(value[2])
    return value


def main():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not mix with the answers
    native = Native(sys.argv[1])
    while True:
        try:
            name, options, args = read(sys.stdin.buffer)
        except EOFError:
            return
        args = [restore(a) for a in args]
        code, message, stats = native.call(name, options, args)
        write(answers, (code, message, stats, [a for a in args if isinstance(a, np.ndarray)]))


main()
