"""``python -m mxq_ext`` is ``mxq``, and without arguments ``mxq doctor``: it works where the script is not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["doctor"])
