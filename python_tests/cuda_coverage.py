"""Line coverage of csrc/cuda by the tests of the CUDA kernels, with gcov. A plugin of pytest:

    SIMT_MODE=gcov PYTHONPATH=python_tests:. python -m pytest -q -p cuda_coverage python_tests/test_cuda_{kernels,layout,dispatch,ops,nn,attention}.py
"""

from pathlib import Path

import cuda_tools


def pytest_terminal_summary(terminalreporter):
    folder = cuda_tools.ROOT / "csrc" / "cuda"
    every = {Path(f): counts for f, counts in cuda_tools.library().coverage().items() if folder in Path(f).parents}
    terminalreporter.section("line coverage of csrc/cuda")
    for path, counts in sorted(every.items()):
        missed = sorted(line for line, count in counts.items() if not count)
        terminalreporter.write_line(f"{path.name:16} {len(counts) - len(missed):4} of {len(counts):4}  not run: {', '.join(map(str, missed)) or 'none'}")
    lines = [count for counts in every.values() for count in counts.values()]
    terminalreporter.write_line(f"all              {sum(map(bool, lines)):4} of {len(lines):4}  {sum(map(bool, lines)) / len(lines):.1%}")
