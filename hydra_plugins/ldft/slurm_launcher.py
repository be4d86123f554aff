"""ldft's Hydra launcher for SLURM: submits cells through submitit, by hydra-submitit-launcher's job, and returns at once."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

# Parameters of submitit for all kinds of clusters; the others are SLURM's own.
_COMMON = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)


class SlurmLauncher(Launcher):
    """params: the keys of conf/hydra/launcher/slurm.yaml, named as hydra-submitit-launcher names them."""

    def __init__(self, **params: Any) -> None:
        self._params: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in params.items()
        }
        from ldft.cli.overrides import DETACH

        self.detach = DETACH in os.environ
        self.partition: str | None = self._params.get("partition")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise NotImplementedError("ldft's sweeper calls submit")

    def submit(self, cells: Sequence[list[str]], needs: Any) -> list[str]:
        """One job array of these cells; returns their job ids. Raises LdftError."""
        from ldft.errors import ConfigError
        from ldft.sweep import jobs

        try:
            import submitit
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (  # type: ignore[import-untyped]
                SlurmLauncher as Job,
            )
        except ModuleNotFoundError as error:
            raise ConfigError("hydra/launcher", f"slurm needs {error.name}; pip install 'ldft[slurm]'") from None
        given = {key: value for key, value in self._params.items() if value not in (None, [], {})}
        folder = Path(given.pop("submitit_folder"))
        python = given.pop("python", None)
        given |= {"nodes": needs.nodes, "tasks_per_node": 1}
        for key in ("mem_gb", "gpus_per_node", "cpus_per_task"):
            value = getattr(needs, key)
            if value is not None and not self._says(key, given):
                given[key] = value
        # What it needs of Hydra to run a cell there; its parameters are those of the queue, which the job does not use.
        job = Job()
        job.setup(hydra_context=self._context, task_function=self._task, config=self._config)
        state = Singleton.get_state()
        work = [(list(cell), "hydra.sweep.dir", index, f"cell {index}", state) for index, cell in enumerate(cells)]
        try:
            with redirect_stderr(io.StringIO()):  # submitit repeats what sbatch says, which the exception has
                executor = submitit.AutoExecutor(
                    folder=folder, cluster="slurm", slurm_max_num_timeout=0, slurm_python=python
                )
                executor.update_parameters(**{key if key in _COMMON else f"slurm_{key}": given[key] for key in given})
                return [str(one.job_id) for one in executor.map_array(job, *zip(*work, strict=True))]
        except (submitit.core.utils.FailedJobError, RuntimeError, ValueError) as error:
            raise jobs.refused(error) from None

    @staticmethod
    def _says(key: str, given: dict[str, Any]) -> bool:
        """Whether the user asked for this resource, in any of the ways that sbatch knows."""
        others = {
            "mem_gb": ("mem_per_gpu", "mem_per_cpu"),
            "gpus_per_node": ("gres", "gpus_per_task"),
            "cpus_per_task": ("cpus_per_gpu",),
        }
        further = given.get("additional_parameters") or {}
        return any(name in given for name in (key, *others[key])) or any(name in further for name in (key, "exclusive"))
