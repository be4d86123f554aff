"""Makes DeepSpeed compile its CPU operators for x86-64-v3 instead of for this machine's own CPU.

Python imports this at its start when the folder is on PYTHONPATH. build_ops.py does so on the host, and the tests do so in the
emulated machine, whose CPU has AVX2 but no AVX-512. Both sides then ask torch's loader for the same flags, so the build of the
host is up to date in there and is loaded as it is. The product knows nothing of this.
"""

import importlib.abc
import importlib.machinery
import sys

BUILDER = "deepspeed.ops.op_builder.builder"


class _PatchBuilder(importlib.abc.MetaPathFinder):
    """Finds DeepSpeed's builder as usual, and replaces two methods of it once it is loaded."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != BUILDER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.OpBuilder.cpu_arch = lambda self: "-march=x86-64-v3"
            module.OpBuilder.simd_width = lambda self: "-D__AVX256__"

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _PatchBuilder())
