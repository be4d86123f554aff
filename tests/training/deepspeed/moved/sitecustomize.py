"""A planted fault, for test_roles.py: with this folder on PYTHONPATH, a rank trains with one tensor moved out of its arena."""

import importlib.util
import sys
from typing import Any

MOVED = "fp32_partitioned_groups_flat[0].exp_avg"


class _Finder:
    """Wraps ldft's training loop when it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "ldft.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: Any) -> None:
            load(module)
            train = module.run

            def run(config: Any, engine: Any, *arguments: Any) -> Any:
                from ldft.training.deepspeed import roles

                moved = next(item for item in roles.tensors(engine) if item.name == MOVED)
                moved.tensor.data = moved.tensor.clone()
                return train(config, engine, *arguments)

            module.run = run

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
