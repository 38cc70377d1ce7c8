"""Runs `society.experiments.sandbox` without the packages around it, which take 0.2 s to import.

Started by its path, with the interpreter's options -I and -S.
"""

import sys
from pathlib import Path
from types import ModuleType


def _main() -> None:
    for name, path in (("society", []), ("society.experiments", [str(Path(__file__).parent)])):
        package = ModuleType(name)
        package.__path__ = path
        sys.modules[name] = package
    from society.experiments import sandbox

    sandbox.main(sys.argv[1:])


if __name__ == "__main__":
    _main()
